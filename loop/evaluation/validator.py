"""Validation in mid-run: the loss of the validation split, and a few sample notes."""

from ..config.schema import Config
from ..data.batch_plan import PackingSpec
from ..data.dataset import TrainingData
from ..distributed.stop import StopRequest
from ..distributed.world import Ranks
from ..generation.sharded import generate_sharded
from ..model.build import Execution
from .loss import evaluate_loss


class Validator:
    """Evaluates and samples where the run's plan says so. Every rank must call `run`."""

    def __init__(
        self,
        config: Config,
        execution: Execution,
        engine,
        tokenizer,
        data: TrainingData,
        ranks: Ranks,
        stop: StopRequest,
        logger,
    ) -> None:
        """logger: a monitor's RunLogger."""
        self.config = config
        # Rows of an evaluation are not padded to the shape of CUDA graphs: those run in training.
        self.packing = PackingSpec(execution.max_tokens, config.max_seq_len)
        self.engine = engine
        self.tokenizer = tokenizer
        self.data = data
        self.ranks = ranks
        self.stop = stop
        self.logger = logger

    def run(self, state, skip: bool = False) -> bool:
        """Fills `state.eval_metrics` and returns True; or returns False, and logs nothing.

        False when `skip`, or when the run is asked to stop meanwhile: `state.eval_metrics` is None
        then, so that the resumed run repeats the validation. state: a checkpoint's TrainState.
        """
        state.eval_metrics = None if skip else self._evaluate(state.step)
        return state.eval_metrics is not None

    def _evaluate(self, step: int) -> dict[str, float] | None:
        if not self.data.valid:
            return {}
        metrics = evaluate_loss(self.engine, self.data.valid, self.packing, self.ranks, self.stop)
        notes = generate_sharded(
            self.engine,
            self.tokenizer,
            self.data.samples,
            self.config.monitor.sample_max_new_tokens,
            self.ranks,
            self.stop,
            # A few notes, of which each rank writes some.
            -(-len(self.data.samples) // self.ranks.world_size),
        )
        if self.ranks.any(self.stop.requested):
            return None
        self.logger.log_validation(step, metrics, {key: note.text for key, note in notes.items()})
        return metrics
