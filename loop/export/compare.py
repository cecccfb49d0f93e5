"""Three ways to ship an adapter, measured: on its NF4 base, merged into the 16-bit base, merged into the dequantised one.

`./launch.sh merge --adapter DIR --out DIR --report runs/NAME/config.yaml`
"""

import gc
import json
from pathlib import Path

import torch

from ..config.cli import load_config
from ..config.schema import ConfigError
from ..data.dataset import load_examples
from ..data.soap import has_all_sections
from ..distributed.files import atomic_folder
from ..generation.decode import ROWS, generate_notes
from ..generation.loading import load_for_generation
from ..generation.sharded import prompt_of
from ..model.loading import load_tokenizer
from .audit import standalone_loss
from .merge import WAYS, merge

ADAPTER = "adapter on NF4"
NOISE = 0.01  # of a loss; two merged models closer than this are told apart by their notes


def verdict(rows: dict[str, dict]) -> str:
    """Which way to ship, in a sentence. rows: loss in nats a token and `same`, how many notes are the adapter's word for word, by way.

    The merged model with the lower loss; where the losses are as good as equal, the one that writes more of the adapter's notes, and then the
    dequantised one, since it is the model that was trained. Neither, where both lose more than the noise against the adapter."""
    good = [
        way for way in reversed(WAYS) if rows[way]["loss"] <= (1 + NOISE) * rows[ADAPTER]["loss"]
    ]
    if not good:
        return (
            "ship the adapter on its NF4 base: merging either way costs more than 1 % of the loss"
        )
    lowest = min(rows[way]["loss"] for way in good)
    best = max(
        (way for way in good if rows[way]["loss"] <= (1 + NOISE) * lowest),
        key=lambda way: rows[way]["same"],
    )
    nearer = [rows[way]["same"] for way in WAYS].count(rows[best]["same"]) == 1
    return f"ship {best}: " + (
        "no other merged model has a lower loss"
        if len(good) == 1 or rows[best]["loss"] == lowest
        else "the losses are as good as equal, and "
        + (
            "its notes are nearer to the adapter's"
            if nearer
            else "it is the model that was trained"
        )
    )


def write_all(
    adapter: str | None, base: str | None, prompts: list[list[int]], max_new_tokens: int, device
) -> list[str]:
    """The notes of prompts by a model that is loaded for them and let go."""
    model, tokenizer = load_for_generation(adapter, base, device)
    notes = [
        note.text
        for at in range(0, len(prompts), ROWS)
        for note in generate_notes(model, tokenizer, prompts[at : at + ROWS], max_new_tokens)
    ]
    del model
    gc.collect()
    if (
        torch.cuda.is_available()
    ):  # what this process keeps for itself, the fresh one for the loss lacks
        torch.cuda.empty_cache()
    return notes


def three_ways(
    adapter: str, out: str, base: str | None, config_file: str, split: str, notes: int, device
) -> str:
    """Merges both ways, to `out`/16bit and `out`/nf4, measures the three on a split of the run's data, each loss in a process of its own, and
    returns a table with the verdict, which is in `out`/report.json, too. Raises ConfigError, AuditError."""
    config = load_config(["--config", config_file])
    if base:
        raise ConfigError(
            "--base: not with --report, where PEFT alone finds the base; write its new place into adapter_config.json"
        )
    examples = load_examples(config, load_tokenizer(config.base, config.revision), split)[0]
    if not examples:
        raise ConfigError(
            f"--report {config_file}: data.{split} is not set, so there is nothing to measure on"
        )
    prompts = [prompt_of(e).tolist() for e in examples[: max(notes, 0)]]
    with atomic_folder(Path(out)) as aside:
        for way in WAYS:
            merge(adapter, str(aside / way), None, way, device)
        rows, written = {}, {}
        for way in (ADAPTER, *WAYS):
            folder = Path(adapter) if way == ADAPTER else aside / way
            loss = standalone_loss(folder, examples, device, timeout=3600)
            if isinstance(loss, str):
                raise ConfigError(f"{way}: its loss could not be measured ({loss})")
            lora, whole = (adapter, None) if way == ADAPTER else (None, str(folder))
            written[way] = (
                write_all(lora, whole, prompts, config.monitor.sample_max_new_tokens, device)
                if prompts
                else []
            )
            same = sum(a == b for a, b in zip(written[ADAPTER], written[way]))
            rows[way] = {
                "loss": loss,
                "sections": sum(map(has_all_sections, written[way])),
                "same": same,
            }
        (aside / "report.json").write_text(
            json.dumps({"split": split, "ways": rows, "verdict": verdict(rows)}, indent=2)
        )
    lines = [
        f"{split}: loss on {len(examples)} examples, {len(prompts)} notes",
        f"{'':16}{'loss':>9}{'S, O, A, P':>12}{'the same notes':>16}",
    ]
    lines += [
        f"{way:16}{row['loss']:9.4f}{row['sections']:12}{row['same']:16}"
        for way, row in rows.items()
    ]
    return "\n".join([*lines, verdict(rows), f"written to {out}"])
