"""What a run knows of itself after a number of steps, besides its tensors."""

import dataclasses
from collections import deque

from ..config.schema import RunConfig
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

    @classmethod
    def from_manifest(cls, run: RunConfig, manifest: dict) -> "TrainState":
        """The state that `to_manifest` wrote; the state of a new run for an empty manifest."""
        return cls(
            run,
            step=manifest.get("step", 0),
            eval_metrics=manifest.get("figures"),
            skipped_steps=manifest.get("skipped", 0),
            recent_losses=deque(manifest.get("recent_losses", []), maxlen=RECENT_LOSSES),
        )

    def to_manifest(self) -> dict:
        """The state in JSON's types, under the keys that manifests have had from the start."""
        return {
            "step": self.step,
            "figures": self.eval_metrics,
            "skipped": self.skipped_steps,
            "recent_losses": list(self.recent_losses),
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
