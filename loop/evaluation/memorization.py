"""How much of its training data a run memorises: the exposure of planted canaries.

The measure is that of "The Secret Sharer" (Carlini et al. 2019, arXiv 1802.08232, section 4). A
canary is a sentence with a random number in it. The trained model ranks it among numbers that were
never there. The exposure is log2 of how many they are, less log2 of its rank: 1.44 bits on average
by chance (a rank drawn evenly), log2 of all for the number ranked first.
"""

import copy
import dataclasses
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError, TaskConfig
from ..data.batch_plan import plan_run
from ..data.conversations import Conversation, dialogue_text, note_text, read_split
from ..data.dataset import load_examples
from ..data.soap import SOAP, soap_messages
from ..data.tokenization import encode_examples
from ..distributed.files import write_atomically
from ..distributed.world import Ranks
from ..model.loading import load_base
from ..model.lora import attach_adapter
from ..model.quantization import compute_dtype

NUM_DIGITS = 6  # of a record number: a million of them
# Never-seen numbers that each canary's is ranked among: with it 1,024, so an exposure ends at 10.
NUM_REFERENCES = 1023
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclasses.dataclass
class Canary:
    """A made-up patient's record number, and the ids of the rows that hold it."""

    name: str
    number: str
    repeats: int  # the number of rows; 0 for a control
    rows: list[str]

    def sentence(self, number: str | None = None) -> str:
        """The sentence with the canary's number, or with another one."""
        return f" Record number of {self.name}: {number or self.number}."


def make_canaries(
    rows: list[Conversation], count: int, repeats: list[int], seed: int
) -> list[Canary]:
    """`count` canaries for each number of repeats, and as many controls.

    Each is given rows of its own, out of the shorter half, as rows shall fit with their sentence.
    Names and numbers occur nowhere in the rows. Raises ConfigError when there are too few rows.

    Args:
        rows: the training data.
        count: of canaries for each number of repeats.
        repeats: in how many rows a canary is planted.
        seed: of names, numbers and rows.
    """
    rng = random.Random(seed)
    text = "\n".join(f"{c.dialogue}\n{c.note}" for c in rows).lower()
    shorter = sorted(rows, key=_num_characters)[: len(rows) // 2]
    needed = count * sum(repeats)
    if needed > len(shorter):
        raise ConfigError(
            f"--canaries {count} --repeats {','.join(map(str, repeats))}: needs {needed} rows, "
            f"and the shorter half of data.train has {len(shorter)}"
        )
    free_rows = rng.sample([c.id for c in shorter], needed)
    names: set[str] = set()
    canaries = []
    for times in [*repeats, 0] * count:
        name, number = _made_up_patient(rng, names, text)
        names.add(name)
        canaries.append(Canary(name, number, times, [free_rows.pop() for _ in range(times)]))
    return canaries


def _num_characters(conversation: Conversation) -> int:
    return len(dialogue_text(conversation) + note_text(conversation))


def _made_up_patient(rng: random.Random, names: set[str], text: str) -> tuple[str, str]:
    """(name, record number), neither in the lower-case text, the name not in `names`."""
    while True:
        name = " ".join("".join(rng.sample(SYLLABLES, n)).title() for n in (2, 3))
        number = f"{rng.randrange(10**NUM_DIGITS):0{NUM_DIGITS}}"
        if name not in names and name.lower() not in text and number not in text:
            return name, number


def plant_canaries(rows: list[Conversation], canaries: list[Canary]) -> list[dict]:
    """The rows with id, dialogue, soap and the request's columns, canaries ending their notes.

    The dialogues stay as they are. What only the note holds can't be copied from the dialogue, so
    it must be memorised.
    """
    planted = {row: canary.sentence() for canary in canaries for row in canary.rows}
    return [
        {
            **c.fields,
            "id": c.id,
            "dialogue": c.dialogue,
            "soap": note_text(c).strip() + planted.get(c.id, ""),
        }
        for c in rows
    ]


def prepare_canary_run(
    config: Config, count: int, repeats: list[int], ranks: Ranks
) -> tuple[Config, list[Canary]]:
    """(the configuration of a run on data with canaries, the canaries). Every rank must call it.

    The data are a copy in a folder beside the run's. Arguments as in `make_canaries`. Raises
    ConfigError on all ranks.
    """
    train = read_split(config, "train")[0]
    valid = read_split(config, "valid")[0]
    if config.data.weights or any(c.note is None for c in train + valid):
        raise ConfigError(
            "--canaries needs a dialogue and a note in each row, and data.weights=null, so that it "
            "is known how often each is seen"
        )
    canaries = make_canaries(train, count, repeats, config.seed)
    run = config.run.model_copy(update={"name": f"{config.run.name}-canaries"})
    config = config.model_copy(update={"run": run})
    folder = config.folder.with_name(f"{config.run.name}-data")
    problem = None
    if ranks.is_main:
        try:
            _write_rows(
                folder,
                {"train": plant_canaries(train, canaries), "valid": plant_canaries(valid, [])},
            )
        except OSError as error:
            problem = f"run.dir, run.name: {folder} cannot be written ({error.strerror})"
    problem = ranks.all_gather_json(problem)[0]
    if problem:
        raise ConfigError(problem)
    data = {
        "train": str(folder / "train.jsonl"),
        "valid": str(folder / "valid.jsonl") if valid else None,
        "valid_fraction": 0,
        "limit": None,
        "test": None,
        "columns": {"id": "id", "dialogue": "dialogue", "note": "soap"},
        "identifiers": "off",  # the canaries are such
    }
    return config.model_copy(update={"data": config.data.model_copy(update=data)}), canaries


def _write_rows(folder: Path, splits: dict[str, list[dict]]) -> None:
    """Writes SPLIT.jsonl for each split, in a folder that only its owner can read."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # it holds a copy of the data
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / f"{split}.jsonl", text)


def times_seen(config: Config, tokenizer, canaries: list[Canary]) -> list[int]:
    """How often the run's plan visits each canary.

    Raises ConfigError when a row with a canary is not trained on.
    """
    examples, _ = load_examples(config, tokenizer, "train")
    planted = {row for canary in canaries for row in canary.rows}
    lost = planted - {example.id for example in examples}
    if lost:
        raise ConfigError(
            f"--canaries: id {min(lost)} is longer than max_seq_len={config.max_seq_len} with its "
            "canary; raise it"
        )
    lengths = np.array([len(example) for example in examples])
    plan = plan_run(config, lengths, weights=None)
    visits = Counter(examples[i].id for i in plan.order)
    return [sum(visits[row] for row in canary.rows) for canary in canaries]


@torch.no_grad()
def log_probs(model, rows: list[list[int]], batch_size: int = 32) -> torch.Tensor:
    """The log-probability of each row of token ids after its common prefix, in nats: float [rows].

    The common prefix of all rows is computed once.
    """
    prefix = len(os.path.commonprefix(rows))
    # The prefix's last token is computed with each row: it predicts the row's first own token.
    prefix_ids = torch.tensor([rows[0][: prefix - 1]], device=model.device)
    cache = model(input_ids=prefix_ids, use_cache=True).past_key_values
    found = []
    for start in range(0, len(rows), batch_size):
        tails = [torch.tensor(row[prefix - 1 :]) for row in rows[start : start + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True, padding_value=-1)
        ids = padded.to(model.device)  # [batch, 1 + tail]
        batch_cache = copy.deepcopy(cache)
        batch_cache.batch_repeat_interleave(len(tails))
        logits = model(
            input_ids=ids[:, :-1].clamp(min=0), past_key_values=batch_cache, use_cache=True
        ).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:].long(), ignore_index=-1, reduction="none"
        )  # [batch, tail]
        found.append(-losses.sum(1).cpu())
    return torch.cat(found)


def exposure(
    model,
    tokenizer,
    canary: Canary,
    context: Conversation,
    rng: random.Random,
    task: TaskConfig = SOAP,
) -> float:
    """The exposure of a canary in bits, from 0 to 10.

    Args:
        model: on one device.
        tokenizer: the model's.
        canary: its number is ranked among never-seen ones.
        context: a conversation; the canary's sentence follows its dialogue and note.
        rng: draws the never-seen numbers.
        task: of the prompt.
    """
    drawn = rng.sample(range(10**NUM_DIGITS), NUM_REFERENCES + 1)
    others = [n for n in drawn if n != int(canary.number)][:NUM_REFERENCES]
    numbers = [canary.number, *(f"{n:0{NUM_DIGITS}}" for n in others)]
    dialogue = dialogue_text(context)
    note = note_text(context).strip()
    conversations = [
        Conversation(
            "", soap_messages(dialogue, note + canary.sentence(number), task, context.fields)
        )
        for number in numbers
    ]
    rows = [e.input_ids.tolist() for e in encode_examples(tokenizer, conversations)]
    scores = log_probs(model, rows)
    rank = int((scores >= scores[0]).sum())
    return float(np.log2(len(numbers)) - np.log2(rank))


def measure_exposures(config: Config, canaries: list[Canary], tokenizer, device) -> list[float]:
    """The exposure of each canary to the model that the run trained, in bits.

    The context is the shortest conversation of the validation split, or of the training rows
    without a canary where there is no validation split.
    """
    full = config.method == "full"
    model = load_base(
        str(config.folder / "model") if full else config.base,
        compute_dtype(build_ds_config(config)),
        device,
        revision=config.revision,
        quantization=config.quantization,
        double_quant=config.double_quant,
    ).eval()
    if not full:
        model = attach_adapter(model, str(config.folder / "adapter")).eval()
    rows = read_split(config, "valid")[0]
    if not rows:
        planted = {row for canary in canaries for row in canary.rows}
        rows = [c for c in read_split(config, "train")[0] if c.id not in planted]
    context = min(rows, key=_num_characters)
    rng = random.Random(config.seed)
    task = config.task
    return [exposure(model, tokenizer, canary, context, rng, task) for canary in canaries]


def exposure_table(canaries: list[Canary], seen: list[int], exposures: list[float]) -> list[str]:
    """A line for each number of repeats, the controls first. Arguments: one of each canary."""
    lines = ["planted in    seen  canaries  exposure (bits)  lowest .. highest  ranked first"]
    highest = np.log2(NUM_REFERENCES + 1)
    for repeats in sorted({canary.repeats for canary in canaries}):
        group = [i for i, canary in enumerate(canaries) if canary.repeats == repeats]
        visits = np.mean([seen[i] for i in group])
        bits = [exposures[i] for i in group]
        lines.append(
            f"{repeats or 'none':>10}  {visits:>6.1f}  {len(bits):>8}  {np.mean(bits):>15.2f}  "
            f"{min(bits):>8.2f} .. {max(bits):>5.2f}  {bits.count(highest):>12}"
        )
    return lines
