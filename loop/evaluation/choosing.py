"""Which validation of a run is the best: by its loss, or by a metric of notes written for it.

`run.export`, `run.patience` and the checkpoints that stay go by it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config.schema import Config, ConfigError, TaskConfig
from ..data.conversations import Conversation, read_split
from ..data.dataset import TrainingData
from ..data.soap import SOAP
from ..data.tokenization import Example
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..generation.decode import Note
from .baselines import rows_of
from .scoring import metrics_of, ratio, score_note, section_metrics

LOSS = "loss"
# A higher value of these is no better note.
WORSE_IF_MORE = ("facts/contradicted", "facts/unsaid", "facts/critical")
NOT_FOR_CHOOSING = ("looped", "markdown", "repetition", "length", LOSS, *WORSE_IF_MORE)


@dataclass(frozen=True)
class Choice:
    """What a validation is judged by."""

    metric: str = LOSS  # or a name in METRICS, of which higher is better
    notes: str = ""  # for a metric of notes: which ones

    @classmethod
    def of(cls, config: Config) -> "Choice":
        """What the configuration says. Raises ConfigError for a metric that can't choose."""
        metric = config.monitor.best
        if metric == LOSS:
            return cls()
        possible = [
            name for name in metrics_of(config.task) if not name.startswith(NOT_FOR_CHOOSING)
        ]
        if metric not in possible:
            own = {name for name in section_metrics(config.task) if "rouge" in name}
            shown = [name for name in possible if name not in own]  # without S/rouge1 and the like
            raise ConfigError(f"monitor.best={metric}: must be one of {LOSS}, {', '.join(shown)}")
        if count := config.monitor.best_notes:
            return cls(metric, f"{count} notes")
        return cls(metric, f"{len(config.monitor.sample_notes)} sample notes")

    def __str__(self) -> str:
        """For logs, and to tell whether two values were measured alike."""
        return f"{self.metric} of {self.notes}" if self.notes else "validation loss"

    @property
    def is_of_notes(self) -> bool:
        return self.metric != LOSS

    @property
    def key(self) -> str:
        """Of the value among the figures of a validation, as metrics.jsonl has them."""
        return f"eval/{self.metric}"

    def value(self, figures: dict[str, float] | None) -> float | None:
        """The value in the figures of a validation; None where it is missing or no finite number.

        A metric is missing where nothing was to be counted, such as facts in notes without any.
        """
        value = (figures or {}).get(self.key)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    def is_better(self, value: float | None, best: float | None) -> bool:
        """Whether a value beats the best one so far; None never does, nor does an equal one."""
        if value is None or best is None:
            return value is not None
        return value < best if self.metric == LOSS else value > best

    def value_of_checkpoint(self, manifest: dict[str, Any]) -> float | None:
        """The value in a checkpoint's manifest; None without one, or if it was measured otherwise.

        Manifests of older code have the loss alone.
        """
        measured = manifest.get("best", {}).get("by")
        if self.is_of_notes and measured != str(self):
            return None
        return self.value(manifest.get("figures"))


def chosen_examples(config: Config, data: TrainingData) -> list[Example]:
    """The validation examples whose notes are scored at each validation; [] if the loss chooses."""
    if config.monitor.best == LOSS:
        return []
    if not config.monitor.best_notes:
        return data.samples
    return sorted(data.valid, key=lambda e: e.id)[: config.monitor.best_notes]


def read_references(config: Config, examples: list[Example]) -> list[Conversation]:
    """The conversations of validation examples, in their order. Reads nothing for none.

    Raises ConfigError for an example that data.valid does not hold.
    """
    if not examples:
        return []
    conversations = {c.id: c for c in read_split(config, "valid")[0]}
    for example in examples:
        if example.id not in conversations:
            raise ConfigError(
                f"monitor.best={config.monitor.best}: data.valid has no {example.id} any more"
            )
    return [conversations[example.id] for example in examples]


def score_notes(
    conversations: list[Conversation],
    notes: dict[str, Note],
    ranks: Ranks,
    task: TaskConfig = SOAP,
) -> dict[str, float]:
    """{"eval/NAME": value} of every metric of notes, as evaluate computes it, equal on every rank.

    {} without conversations. A metric whose denominators are zero in all notes is left out. Each
    rank scores its shard. Every rank must call it; their number changes nothing.

    Args:
        conversations: with dialogue and reference.
        notes: the note of each conversation, by id.
        task: names the headings of notes and references.
    """
    if not conversations:
        return {}
    set_activity("scoring notes")
    rows = rows_of(conversations, notes)
    mine = rows[ranks.rank :: ranks.world_size]
    shards = ranks.all_gather_json([score_note(row, task) for row in mine])
    scores = [shards[i % ranks.world_size][i // ranks.world_size] for i in range(len(rows))]
    figures = {}
    for name, metric in metrics_of(task).items():
        if metric.score:
            value = ratio(np.array([score[name] for score in scores], dtype=np.float64))
            if value is not None:
                figures[f"eval/{name}"] = value
    return figures
