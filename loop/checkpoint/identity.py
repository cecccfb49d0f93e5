"""What makes two runs the same one: what a checkpoint must share with the run that goes on from it, and what may change if it is said.

`state`: the tensors would mean nothing in another model; refused. `plan`: step N would be other examples than the ones meant;
refused, unless run.resume=force. `settings`: lr, steps, dropout and the like; a person may change them in mid-run, and is told.
"""

import hashlib
import json
from pathlib import Path

from ..config.schema import Config, ConfigError
from ..config.source import source_digest
from ..data.batch_plan import BatchPlan
from ..data.tokenization import Example
from ..distributed.world import Ranks
from ..model.loading import loading, resolve_base
from ..model.streaming import fetch_base

# Where and how a run computes, and what the other two kinds hold already: not settings in the sense above.
NOT_SETTINGS = {
    "base",
    "revision",
    "attention",
    "gradient_checkpointing",
    "micro_batch_size",
    "deepspeed",
    "run",
    "monitor",
    "data",
    "lora",
}


def run_identity(
    config: Config, tokenizer, examples: list[Example], plan: BatchPlan
) -> dict[str, dict]:
    """The three kinds, as they stand in a manifest; `at_step` adds the order of the examples."""
    fixed = {"method": config.method, "double_quant": config.double_quant}
    lora = (
        {
            f"lora.{key}": value
            for key, value in sorted(config.lora.items())
            if key != "lora_dropout"
        }
        if config.method != "full"
        else {}
    )
    budget = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "max_seq_len": config.max_seq_len,
    }
    settings = config.model_dump(mode="json", exclude=NOT_SETTINGS | fixed.keys() | budget.keys())
    found = {
        "state": {"base": base_fingerprint(config.base, config.revision), **fixed, **lora},
        "plan": {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "examples": examples_fingerprint(examples),
            **budget,
        },
        "settings": settings
        | {"steps": len(plan), "lora.lora_dropout": config.lora["lora_dropout"]},
    }
    return json.loads(json.dumps(found))  # as it will be read again: tuples are lists


def check_equal_on_all_ranks(ranks: Ranks, identity: dict, made_by: dict[str, str]) -> None:
    """Ranks on several machines may have been started on other code, libraries, data or settings; their collectives would hang, or train on
    a mixture. Every rank must call it; raises ConfigError on all, naming the ranks and what differs."""
    code = source_digest("loop")[:16]
    mine = (
        identity["state"]
        | identity["plan"]
        | identity["settings"]
        | {"code of loop/": code}
        | made_by
    )
    everyone = ranks.all_gather_json(
        {key: value for key, value in mine.items() if key not in ("device", "commit")}
    )
    for rank, other in enumerate(everyone):
        for key in {**everyone[0], **other}:
            if other.get(key) != everyone[0].get(key):
                raise ConfigError(
                    f"rank {rank} has another {key} than rank 0: {other.get(key)!r}, not {everyone[0].get(key)!r}; start all machines "
                    "with the same code, libraries, data and settings"
                )


def at_step(identity: dict, plan: BatchPlan, step: int) -> dict:
    """With the order of the examples up to `step`: a plan that is only longer or shorter behind it is the same up to here."""
    return identity | {
        "plan": identity["plan"]
        | {"order of the examples": _short(plan.order[: plan.offsets[step]].tobytes())}
    }


def check_compatible(
    path: Path, saved: dict, now: dict, plan: BatchPlan, step: int, force: bool
) -> list[str]:
    """Compares a checkpoint's identity with this run's. Returns remarks on what changed; raises ConfigError naming the first difference
    that matters. step: of the checkpoint, which the plan must reach."""
    if step > len(plan):
        raise ConfigError(
            f"{path}: the run has made {step} steps already, and is to have {len(plan)} (max_steps, epochs); give it "
            "another run.name"
        )
    if not saved.keys() >= {"state", "plan", "settings"}:
        raise ConfigError(
            f"{path}: written by another version of this loop; give the run another run.name, or start over with run.resume=false"
        )
    now, remarks = at_step(now, plan, step), []
    for kind in ("state", "plan", "settings"):
        for key in {**saved[kind], **now[kind]}:
            was, is_now = saved[kind].get(key), now[kind].get(key)
            if was == is_now:
                continue
            if kind == "state" or (kind == "plan" and not force):
                way_out = ", or go on all the same with run.resume=force" if kind == "plan" else ""
                raise ConfigError(
                    f"{path}: {key} was {was!r} and is {is_now!r} now; change it back, give the run another run.name, or start "
                    f"over with run.resume=false{way_out}"
                )
            remarks.append(
                f"changed     {key} was {was!r} and is {is_now!r} from step {step + 1} on"
            )
    return remarks


def base_fingerprint(base: str, revision: str | None = None) -> str:
    """A hash of the base's content: config.json, and of each weight file its size and 64 samples, the header first. The name does not count (a
    base may move), and gigabytes are not read."""
    with loading(
        base
    ):  # with its weights, or the hash would be another one before they are downloaded
        folder = fetch_base(resolve_base(base)["pretrained_model_name_or_path"], revision)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(2**16, size // 64)):
                file.seek(start)
                digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of its vocabulary, special tokens and chat template."""
    return _short(
        json.dumps(
            [
                sorted(tokenizer.get_vocab().items()),
                str(tokenizer.special_tokens_map),
                str(tokenizer.chat_template),
            ]
        ).encode()
    )


def examples_fingerprint(examples: list[Example]) -> str:
    """A hash of what is trained on, after tokenising: ids, tokens, and which of them are supervised."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(e.id.encode() + e.input_ids.tobytes() + e.labels.tobytes())
    return digest.hexdigest()[:16]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
