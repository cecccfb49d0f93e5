"""The ways to ship an adapter, measured: on its NF4 base, and merged into a base in each way.

`./launch.sh merge --adapter DIR --out DIR --report runs/NAME/config.yaml`
"""

import gc
import json
from pathlib import Path

import torch

from ..config.cli import load_config
from ..config.schema import Config, ConfigError
from ..data.dataset import load_examples
from ..data.soap import has_all_sections
from ..data.tokenization import Example
from ..distributed.files import atomic_folder
from ..generation.candidates import read_dialogues, write_best_notes
from ..generation.engine import NoteRequest
from ..generation.loading import load_for_generation
from ..generation.sharded import make_requests
from ..model.loading import load_tokenizer
from .audit import standalone_loss
from .merge import WAYS, merge

ADAPTER = "adapter on NF4"
NOISE = 0.01  # of a loss; merged models closer than this are told apart by their notes
LOSS_TIMEOUT = 3600  # seconds


def recommend(rows: dict[str, dict]) -> str:
    """Which way to ship, in a sentence.

    rows: by way, `loss` in nats per token and `same`, how many notes are the adapter's word for
    word. Recommended is the merged model with the lowest loss. Where losses are as good as equal,
    it is the one that writes more of the adapter's notes, and then the dequantised one, since that
    is the model that was trained. Where every merged model loses more than the noise against the
    adapter, it is none of them.
    """

    def as_good_as(way: str, loss: float) -> bool:
        return rows[way]["loss"] <= (1 + NOISE) * loss

    good = [way for way in reversed(WAYS) if as_good_as(way, rows[ADAPTER]["loss"])]
    if not good:
        return (
            "ship the adapter on its NF4 base: merging either way costs more than 1 % of the loss"
        )
    lowest = min(rows[way]["loss"] for way in good)
    best = max((way for way in good if as_good_as(way, lowest)), key=lambda way: rows[way]["same"])
    if len(good) == 1 or rows[best]["loss"] == lowest:
        return f"ship {best}: no other merged model has a lower loss"
    same = [rows[way]["same"] for way in WAYS]
    if same.count(rows[best]["same"]) == 1:
        why = "its notes are nearer to the adapter's"
    else:
        why = "it is the model that was trained"
    return f"ship {best}: the losses are as good as equal, and {why}"


def notes_of(
    adapter: str | None,
    base: str | None,
    requests: list[NoteRequest],
    config: Config,
    device,
) -> list[str]:
    """The notes of some requests, by a model that is loaded for them and freed again."""
    if not requests:
        return []
    model, tokenizer = load_for_generation(adapter, base, device)
    generation = config.generation
    notes = write_best_notes(model, tokenizer, requests, generation, task=config.task)
    del model
    gc.collect()
    if torch.cuda.is_available():
        # What this process keeps reserved, the loss's process would lack.
        torch.cuda.empty_cache()
    return [note.text for note in notes]


def compare_ways(
    adapter: str, out: str, base: str | None, config_file: str, split: str, notes: int, device
) -> str:
    """Merges in all ways and measures each result and the adapter; returns a table and a sentence.

    The merged models are written to `out`/16bit and `out`/nf4, the report to `out`/report.json.
    Each loss is measured in a process of its own.

    Args:
        base: must be None, as PEFT alone finds the base.
        config_file: a run's; its data is measured on.
        split: "valid" or "test", of that data.
        notes: how many notes are written and compared.

    Raises ConfigError, AuditError, OSError and SafetensorError.
    """
    config = load_config(["--config", config_file])
    if base:
        raise ConfigError(
            "--base: not with --report, where PEFT alone finds the base; write its new place into "
            "adapter_config.json"
        )
    examples, _ = load_examples(config, load_tokenizer(config.base, config.revision), split)
    if not examples:
        raise ConfigError(
            f"--report {config_file}: data.{split} is not set, so there is nothing to measure on"
        )
    dialogues = read_dialogues(config, split)
    requests = make_requests(examples[: max(notes, 0)], dialogues, config.generation)
    with atomic_folder(Path(out)) as folder:
        for way in WAYS:
            merge(adapter, str(folder / way), None, way, device)
        rows = measure_ways(adapter, folder, examples, requests, config, device)
        recommendation = recommend(rows)
        report = {
            "split": split,
            "ways": rows,
            "verdict": recommendation,
            "generation": config.generation.model_dump(mode="json"),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2))
    lines = [
        f"{split}: loss on {len(examples)} examples, {len(requests)} notes",
        f"{'':16}{'loss':>9}{'all sections':>14}{'the same notes':>16}",
    ]
    for way, row in rows.items():
        lines.append(f"{way:16}{row['loss']:9.4f}{row['sections']:14}{row['same']:16}")
    return "\n".join([*lines, recommendation, f"written to {out}"])


def measure_ways(
    adapter: str,
    folder: Path,
    examples: list[Example],
    requests: list[NoteRequest],
    config: Config,
    device,
) -> dict[str, dict]:
    """Of the adapter and of each merged model in `folder`: loss, and how many notes are complete.

    config: the run's, of which task and generation count.

    Returns by way: `loss` in nats per token on `examples`, `sections`, the notes of `requests` with
    all sections, and `same`, those that are the adapter's word for word. Raises ConfigError
    where a loss can't be measured, AuditError where a folder can't be loaded.
    """
    rows = {}
    adapters_notes: list[str] = []
    for way in (ADAPTER, *WAYS):
        model = Path(adapter) if way == ADAPTER else folder / way
        loss = standalone_loss(model, examples, device, timeout=LOSS_TIMEOUT)
        if isinstance(loss, str):
            raise ConfigError(f"{way}: its loss could not be measured ({loss})")
        if way == ADAPTER:
            notes = notes_of(adapter, None, requests, config, device)
            adapters_notes = notes
        else:
            notes = notes_of(None, str(model), requests, config, device)
        rows[way] = {
            "loss": loss,
            "sections": sum(has_all_sections(note, config.task) for note in notes),
            "same": sum(a == b for a, b in zip(adapters_notes, notes)),
        }
    return rows
