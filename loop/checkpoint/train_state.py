"""What a run knows of itself after a number of steps, besides its tensors."""

import dataclasses
from collections import deque

from ..config.schema import RunConfig
from ..evaluation.choosing import Choice
from ..optim.skip import loss_spike_threshold

RECENT_LOSSES = 50  # a loss spike is measured against so many


@dataclasses.dataclass
class TrainState:
    """The counters of a run. A checkpoint's manifest holds them, but for skips in a row."""

    run: RunConfig
    step: int = 0  # steps that are done, applied or skipped
    # Of the validation after `step`: {} if none was due, None if it is due and not complete.
    eval_metrics: dict[str, float] | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: deque[float] = dataclasses.field(
        default_factory=lambda: deque(maxlen=RECENT_LOSSES)
    )
    choice: Choice = Choice()  # what validations are judged by
    best: float | None = None  # value of the best validation so far
    best_step: int | None = None  # the steps that were done then
    validations_since_best: int = 0
    exported_step: int | None = None  # at the end: the step whose weights the engine holds

    @classmethod
    def from_manifest(
        cls, run: RunConfig, manifest: dict, choice: Choice = Choice()
    ) -> "TrainState":
        """The state that `to_manifest` wrote; the state of a new run for an empty manifest.

        Where the run chose by something else so far, or by nothing, the count begins anew.
        """
        best = manifest.get("best", {})
        if best.get("by") != str(choice):
            best = {}
        return cls(
            run,
            step=manifest.get("step", 0),
            eval_metrics=manifest.get("figures"),
            skipped_steps=manifest.get("skipped", 0),
            recent_losses=deque(manifest.get("recent_losses", []), maxlen=RECENT_LOSSES),
            choice=choice,
            best=best.get("value"),
            best_step=best.get("step"),
            validations_since_best=best.get("validations_since", 0),
        )

    def to_manifest(self) -> dict:
        """The state in JSON's types, under the keys that manifests have had from the start."""
        return {
            "step": self.step,
            "figures": self.eval_metrics,
            "skipped": self.skipped_steps,
            "recent_losses": list(self.recent_losses),
            "best": {
                "by": str(self.choice),
                "value": self.best,
                "step": self.best_step,
                "validations_since": self.validations_since_best,
            },
        }

    def record(self, loss: float, applied: bool) -> None:
        """Counts a finished step. loss: nats per supervised token; applied: not skipped."""
        self.step += 1
        self.eval_metrics = {}
        if applied:
            self.skipped_in_a_row = 0
            self.recent_losses.append(loss)
        else:
            self.skipped_in_a_row += 1
            self.skipped_steps += 1

    def record_validation(self, figures: dict[str, float] | None) -> None:
        """Takes the figures of the validation after `step`, and whether it is the best so far.

        figures: {} without validation examples; None: it was not completed and stays due. The
        validation before the first step is no candidate, as nothing is trained yet.
        """
        self.eval_metrics = figures
        if not figures or self.step == 0:
            return
        value = self.choice.value(figures)
        if self.choice.is_better(value, self.best):
            self.best = value
            self.best_step = self.step
            self.validations_since_best = 0
        else:
            self.validations_since_best += 1

    @property
    def is_best(self) -> bool:
        """True when the validation after `step` is the best one so far."""
        return self.best_step is not None and self.best_step == self.step

    @property
    def out_of_patience(self) -> bool:
        """True when `run.patience` validations in a row were no better than one before them."""
        patience = self.run.patience
        return patience is not None and self.validations_since_best >= patience

    @property
    def ended(self) -> bool:
        """True when no further step shall be made, whatever the plan says."""
        return self.diverged or self.out_of_patience

    @property
    def validation_due(self) -> bool:
        """True before the first step, and when the validation after `step` was interrupted."""
        return self.eval_metrics is None

    @property
    def last_step_skipped(self) -> bool:
        return self.skipped_in_a_row > 0

    @property
    def diverged(self) -> bool:
        """True when `run.max_skipped_in_a_row` steps in a row were skipped."""
        return self.skipped_in_a_row >= self.run.max_skipped_in_a_row

    @property
    def loss_threshold(self) -> float:
        """The loss above which the next step counts as a spike and is skipped."""
        return loss_spike_threshold(self.recent_losses, self.run.skip_loss_sigmas)
