"""Validation in mid-run: the loss of the validation split, a few sample notes, and scored notes."""

import torch

from ..config.schema import Config
from ..data.batch_plan import PackingSpec
from ..data.dataset import TrainingData
from ..data.tokenization import Example
from ..distributed.stop import StopRequest
from ..distributed.timeline import timed
from ..distributed.world import Ranks
from ..generation.candidates import read_dialogues
from ..generation.decode import Note
from ..generation.engine_choice import free_bytes, keep_writer_cache
from ..generation.sharded import generate_sharded
from ..model.build import Execution
from .choosing import chosen_examples, read_references, score_notes
from .loss import evaluate_loss


def free_beside_steps(execution: Execution, device: torch.device) -> float:
    """Bytes of memory that this process could have and that its steps leave, by the estimate."""
    own = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    steps = sum(execution.estimate_memory(execution.max_tokens).values())
    return free_bytes(device, wanted=0) + own - steps


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
        """logger: a monitor's RunLogger. Raises ConfigError where notes can't be scored."""
        self.config = config
        # Rows of an evaluation are not padded to the shape of CUDA graphs: those run in training.
        self.packing = PackingSpec(execution.max_tokens, config.max_seq_len)
        self.engine = engine
        self.tokenizer = tokenizer
        self.data = data
        self.ranks = ranks
        self.stop = stop
        self.logger = logger
        self.chosen = chosen_examples(config, data)
        self.dialogues = read_dialogues(config, "valid")
        self.references = read_references(config, self.chosen)
        if execution.replicated and config.method != "full":
            keep_writer_cache(engine.module, free_beside_steps(execution, ranks.device) / 2)

    @timed("evaluation")
    def run(self, state, skip: bool = False) -> bool:
        """Fills `state.eval_metrics` and returns True; or returns False, and logs nothing.

        False when `skip`, or when the run is asked to stop meanwhile: `state.eval_metrics` is None
        then, so that the resumed run repeats the validation. state: a checkpoint's TrainState.
        """
        figures = None if skip else self._evaluate(state.step)
        # What chooses must be the same number on all ranks, to the bit.
        state.record_validation(self.ranks.all_gather_json(figures)[0])
        return state.eval_metrics is not None

    def _evaluate(self, step: int) -> dict[str, float] | None:
        if not self.data.valid:
            return {}
        metrics = evaluate_loss(self.engine, self.data.valid, self.packing, self.ranks, self.stop)
        # A few notes, of which each rank writes some.
        rows = max(1, -(-len(self.data.samples) // self.ranks.world_size))
        notes = self._write(self.data.samples, rows)
        scored = notes if self.chosen is self.data.samples else self._write(self.chosen, None)
        if self.ranks.any(self.stop.requested):
            return None
        metrics |= score_notes(self.references, scored, self.ranks, self.config.task)
        self.logger.log_validation(step, metrics, {key: note.text for key, note in notes.items()})
        return metrics

    @timed("sample notes")
    def _write(self, examples: list[Example], rows: int | None) -> dict[str, Note]:
        """Notes of examples by id, cut off when the run is asked to stop.

        rows: as in `generate_sharded`.
        """
        return generate_sharded(
            self.engine,
            self.tokenizer,
            examples,
            self.dialogues,
            self.config.generation,
            self.ranks,
            self.stop,
            rows,
            task=self.config.task,
        )
