"""How much of a training set a run remembers: made-up identifiers, planted a known number of times, against ones it never saw.

The measure is the exposure of "The Secret Sharer" (Carlini et al. 2019, arXiv 1802.08232, section 4): a canary is a sentence with a random number
in it; the trained model ranks it among numbers that were never there; the exposure is log2 of how many there are less log2 of its rank:
by chance 1.44 bits on average (a rank drawn evenly), log2 of all for a number that is ranked first.
`./launch.sh evaluate --canaries N [--repeats 1,4,16] [--config FILE] [key=value ...]` trains by the ordinary loop on the planted copy.
"""

import copy
import dataclasses
import json
import os
import random
from collections import Counter

import numpy as np
import torch

from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError
from ..data.batch_plan import plan_batches
from ..data.conversations import Conversation, dialogue_text, note_text, read_split
from ..data.dataset import load_examples
from ..data.soap import soap_messages
from ..data.tokenization import encode_examples
from ..distributed.files import write_atomically
from ..distributed.world import Ranks
from ..model.loading import load_base
from ..model.lora import attach_adapter
from ..model.quantization import compute_dtype

DIGITS = 6  # of an identifier: a space of a million
REFERENCES = 1023  # never-seen numbers that each canary's is ranked among; with it 1,024, so that the exposure ends at 10 bits


@dataclasses.dataclass
class Canary:
    """A made-up patient's record number, and the ids of the rows that hold it: as many as `repeats`, none for a control."""

    name: str
    number: str
    repeats: int
    rows: list[str]

    def sentence(self, number: str | None = None) -> str:
        return f" Record number of {self.name}: {number or self.number}."


def make_canaries(
    rows: list[Conversation], count: int, repeats: list[int], seed: int
) -> list[Canary]:
    """`count` canaries for each number of repeats and as many controls, each in rows of its own, of the shorter half (with their sentence they
    shall fit, too). Names and numbers stand nowhere in the rows. Raises ConfigError when there are too few rows."""
    rng, text = random.Random(seed), "\n".join(f"{c.dialogue}\n{c.note}" for c in rows).lower()
    shorter = sorted(rows, key=lambda c: len(dialogue_text(c) + note_text(c)))[: len(rows) // 2]
    if count * sum(repeats) > len(shorter):
        raise ConfigError(
            f"--canaries {count} --repeats {','.join(map(str, repeats))}: needs {count * sum(repeats)} rows, and the shorter half of "
            f"data.train has {len(shorter)}"
        )
    free, taken, found = rng.sample([c.id for c in shorter], count * sum(repeats)), set(), []
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    for times in [*repeats, 0] * count:
        name = number = ""  # which is in every text
        while name in taken or name.lower() in text or number in text:
            name = " ".join("".join(rng.sample(syllables, n)).title() for n in (2, 3))
            number = f"{rng.randrange(10**DIGITS):0{DIGITS}}"
        taken.add(name)
        found.append(Canary(name, number, times, [free.pop() for _ in range(times)]))
    return found


def plant(rows: list[Conversation], canaries: list[Canary]) -> list[dict]:
    """The rows as a source with the columns id, dialogue and soap, the canaries at the end of their notes. The dialogues stay as they were:
    what only the note says can't be copied from the dialogue, it must be remembered."""
    planted = {row: canary.sentence() for canary in canaries for row in canary.rows}
    return [
        {"id": c.id, "dialogue": c.dialogue, "soap": note_text(c).strip() + planted.get(c.id, "")}
        for c in rows
    ]


def prepare(
    config: Config, count: int, repeats: list[int], ranks: Ranks
) -> tuple[Config, list[Canary]]:
    """The configuration of the run on the planted copy, which lies in a folder beside the run's, and the canaries. Every rank must call it."""
    train, valid = (read_split(config, split)[0] for split in ("train", "valid"))
    if config.data.weights or any(c.note is None for c in train + valid):
        raise ConfigError(
            "--canaries needs a dialogue and a note in each row, and data.weights=null, so that it is known how often each is seen"
        )
    canaries, problem = make_canaries(train, count, repeats, config.seed), None
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"name": f"{config.run.name}-canaries"})}
    )
    folder = config.folder.with_name(f"{config.run.name}-data")
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)  # it holds a copy of the data
            for split, rows in (("train", plant(train, canaries)), ("valid", plant(valid, []))):
                write_atomically(
                    folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
                )
        except OSError as error:
            problem = f"run.dir, run.name: {folder} cannot be written ({error.strerror})"
    if problem := ranks.all_gather_json(problem)[0]:
        raise ConfigError(problem)
    data = {
        "train": str(folder / "train.jsonl"),
        "valid": str(folder / "valid.jsonl") if valid else None,
        "valid_fraction": 0,
        "limit": None,
        "test": None,
        "columns": {"id": "id", "dialogue": "dialogue", "note": "soap"},
    }
    return config.model_copy(update={"data": config.data.model_copy(update=data)}), canaries


def times_seen(config: Config, tokenizer, canaries: list[Canary]) -> list[int]:
    """How often the run's plan visits each canary. Raises ConfigError when a planted row is not trained on."""
    examples, _ = load_examples(config, tokenizer, "train")
    if lost := {row for c in canaries for row in c.rows} - {e.id for e in examples}:
        raise ConfigError(
            f"--canaries: id {min(lost)} is longer than max_seq_len={config.max_seq_len} with its canary; raise it"
        )
    plan = plan_batches(
        np.array([len(e) for e in examples]),
        config.tokens_per_step,
        config.seed,
        config.epochs,
        config.max_steps,
    )
    visits = Counter(examples[i].id for i in plan.order)
    return [sum(visits[row] for row in c.rows) for c in canaries]


@torch.no_grad()
def log_probs(model, rows: list[list[int]], batch_size: int = 32) -> torch.Tensor:
    """The log-probability of each row of token ids behind what all rows begin with, in nats, float [n]. What they share is computed once."""
    shared = len(os.path.commonprefix(rows))
    cache = model(
        input_ids=torch.tensor([rows[0][: shared - 1]], device=model.device), use_cache=True
    ).past_key_values
    found = []
    for start in range(0, len(rows), batch_size):
        tails = [torch.tensor(row[shared - 1 :]) for row in rows[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True, padding_value=-1).to(
            model.device
        )  # [b, 1 + tail]
        here = copy.deepcopy(cache)
        here.batch_repeat_interleave(len(tails))
        logits = model(
            input_ids=ids[:, :-1].clamp(min=0), past_key_values=here, use_cache=True
        ).logits.float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:].long(), ignore_index=-1, reduction="none"
        )
        found.append(-each.sum(1).cpu())
    return torch.cat(found)


def exposure(model, tokenizer, canary: Canary, context: Conversation, rng: random.Random) -> float:
    """In bits, from 0 to 10: where the model ranks the canary's number among never-seen ones, behind the dialogue and note of `context`."""
    others = [n for n in rng.sample(range(10**DIGITS), REFERENCES + 1) if n != int(canary.number)][
        :REFERENCES
    ]
    numbers = [canary.number, *(f"{n:0{DIGITS}}" for n in others)]
    told = [
        soap_messages(dialogue_text(context), note_text(context).strip() + canary.sentence(number))
        for number in numbers
    ]
    scores = log_probs(
        model,
        [
            e.input_ids.tolist()
            for e in encode_examples(tokenizer, [Conversation("", messages) for messages in told])
        ],
    )
    return float(np.log2(len(numbers)) - np.log2(int((scores >= scores[0]).sum())))


def measure(config: Config, canaries: list[Canary], tokenizer, device) -> list[float]:
    """The exposure of each canary to the model that the run made, in the context of the shortest held-out conversation."""
    whole, options = (
        config.method == "full",
        {"quantization": config.quantization, "double_quant": config.double_quant},
    )
    base = str(config.folder / "model") if whole else config.base
    model = load_base(
        base, compute_dtype(build_ds_config(config)), device, revision=config.revision, **options
    ).eval()
    model = model if whole else attach_adapter(model, str(config.folder / "adapter")).eval()
    planted = {row for c in canaries for row in c.rows}
    rows = read_split(config, "valid")[0] or [
        c for c in read_split(config, "train")[0] if c.id not in planted
    ]
    context, rng = (
        min(rows, key=lambda c: len(dialogue_text(c) + note_text(c))),
        random.Random(config.seed),
    )
    return [exposure(model, tokenizer, canary, context, rng) for canary in canaries]


def table(canaries: list[Canary], seen: list[int], exposures: list[float]) -> list[str]:
    """A line for each number of repeats, the never-seen ones first."""
    lines = ["planted in    seen  canaries  exposure (bits)  lowest .. highest  ranked first"]
    for times in sorted({c.repeats for c in canaries}):
        visits, bits = zip(
            *((n, bits) for c, n, bits in zip(canaries, seen, exposures) if c.repeats == times)
        )
        spread, first = (
            f"{min(bits):>8.2f} .. {max(bits):>5.2f}",
            bits.count(np.log2(REFERENCES + 1)),
        )
        lines.append(
            f"{times or 'none':>10}  {np.mean(visits):>6.1f}  {len(bits):>8}  {np.mean(bits):>15.2f}  {spread}  {first:>12}"
        )
    return lines
