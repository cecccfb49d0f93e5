"""What makes two runs the same one: what a checkpoint must share with the run that resumes.

Three kinds of facts, told apart by what a difference means:
- `state`: the tensors would mean nothing in another model; refused.
- `plan`: step N would see other examples than the ones meant; refused, unless run.resume=force.
- `settings`: lr, steps, dropout and the like; a person may change them in mid-run, and is told.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..config.cli import RENAMED
from ..config.schema import Config, ConfigError
from ..config.source import source_digest
from ..data.batch_plan import BatchPlan
from ..data.tokenization import Example
from ..distributed.world import Ranks
from ..model.loading import config_errors_for, resolve_base
from ..model.lora import check_start
from ..model.streaming import fetch_base
from .run_dir import collect_versions

KINDS = ("state", "plan", "settings")
# Keys of the configuration by what holds them. All others are settings.
IN_STATE = ("method", "double_quant")
IN_PLAN = ("seed", "batch_size", "max_seq_len")
HASHED = {"base", "revision", "data", "task", "adapter"}
BY_FIELD = {"lora"}
ONLY_HOW = {  # where and how a run computes, not what
    "attention",
    "gradient_checkpointing",
    "embedding_on_cpu",
    "chunked_loss",
    "micro_batch_size",
    "deepspeed",
    "run",
    "monitor",
    "generation",
}
NOT_SETTINGS = {*IN_STATE, *IN_PLAN, *HASHED, *BY_FIELD, *ONLY_HOW}
MAY_DIFFER_BETWEEN_RANKS = ("device", "commit")  # of the versions


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """The facts of a run by kind, in JSON's types, and the versions of what it was made with."""

    state: dict[str, Any]
    plan: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        config: Config,
        tokenizer,
        examples: list[Example],
        plan: BatchPlan,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "RunIdentity":
        """The identity of a run. It reads samples of the base's weights; downloads them if need be.

        dtype: what the run computes in. Raises ConfigError where the base cannot be read, or the
        adapter to go on from does not fit.
        """
        base = base_fingerprint(config.base, config.revision)
        start = {}
        if config.adapter:
            start["adapter"] = check_start(config.adapter, config.lora, base)[:16]
        lora = {f"lora.{key}": value for key, value in sorted(config.lora.items())}
        dropout = lora.pop("lora.lora_dropout")
        facts = {
            "state": {
                "base": base,
                **start,
                **{key: getattr(config, key) for key in IN_STATE},
                **(lora if config.method != "full" else {}),
            },
            "plan": {
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "examples": examples_fingerprint(examples),
                **{key: getattr(config, key) for key in IN_PLAN},
            },
            "settings": {
                **config.model_dump(mode="json", exclude=NOT_SETTINGS),
                "steps": len(plan),
                "lora.lora_dropout": dropout,
                "dtype": str(dtype).removeprefix("torch."),
            },
        }
        facts = json.loads(json.dumps(facts))  # as a manifest gives them back: tuples are lists
        return cls(**facts, versions=collect_versions())

    def at_step(self, plan: BatchPlan, step: int) -> dict[str, dict]:
        """The facts as a manifest holds them: with the order of the examples up to `step`.

        A plan that is only longer or shorter behind `step` counts as the same one.
        """
        order = _short_hash(plan.order[: plan.offsets[step]].tobytes())
        return {
            "state": self.state,
            "plan": {**self.plan, "order of the examples": order},
            "settings": self.settings,
        }

    def check_equal_on_all_ranks(self, ranks: Ranks) -> None:
        """Raises ConfigError on all ranks, naming the first that differs from rank 0, and in what.

        Ranks on several machines may have been started with other code, libraries, data or
        settings. Their collectives would hang, or they would train on a mixture. Every rank must
        call it.
        """
        mine = {
            **self.state,
            **self.plan,
            **self.settings,
            "code of loop/": source_digest("loop")[:16],
            **self.versions,
        }
        for key in MAY_DIFFER_BETWEEN_RANKS:
            mine.pop(key, None)
        everyone = ranks.all_gather_json(mine)
        first = everyone[0]
        for rank, other in enumerate(everyone):
            for key in {**first, **other}:
                if other.get(key) != first.get(key):
                    raise ConfigError(
                        f"rank {rank} has another {key} than rank 0: {other.get(key)!r}, not "
                        f"{first.get(key)!r}; start all machines with the same code, libraries, "
                        "data and settings"
                    )

    def check_compatible(
        self, path: Path, manifest: dict, plan: BatchPlan, force: bool
    ) -> list[str]:
        """Compares a checkpoint's identity with this run's; returns a note on each changed setting.

        Args:
            path: of the checkpoint, for messages.
            manifest: of the checkpoint; its settings may have names of an older version.
            plan: of this run; it must reach the checkpoint's step.
            force: run.resume=force, which lets `plan` differ.

        Raises ConfigError naming the first difference that matters.
        """
        step = manifest["step"]
        saved = manifest.get("identity", {})
        if step > len(plan):
            raise ConfigError(
                f"{path}: the run has made {step} steps already, and is to have {len(plan)} "
                "(max_steps, epochs); give it another run.name"
            )
        if not saved.keys() >= set(KINDS):
            raise ConfigError(
                f"{path}: written by another version of this loop; give the run another run.name, "
                "or start over with run.resume=false"
            )
        now = self.at_step(plan, step)
        notes = []
        for kind in KINDS:
            old = saved[kind]
            new = now[kind]
            if kind == "settings":
                old = _under_todays_keys(old)
            for key in {**old, **new}:
                if old.get(key) == new.get(key):
                    continue
                change = f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
                if kind == "settings" or (kind == "plan" and force):
                    notes.append(f"changed     {change} from step {step + 1} on")
                    continue
                way_out = ", or go on all the same with run.resume=force" if kind == "plan" else ""
                raise ConfigError(
                    f"{path}: {change} now; change it back, give the run another run.name, or "
                    f"start over with run.resume=false{way_out}"
                )
        return notes


def _under_todays_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """A manifest's settings by the configuration's keys of today.

    Renamed keys have their new names. A key that did not exist yet has its default, as that is what
    the older code did.
    """
    renamed = {RENAMED.get(key, key): value for key, value in settings.items()}
    fields = Config.model_fields.items()
    defaults = {key: field.default for key, field in fields if key not in NOT_SETTINGS}
    return {"dtype": "bfloat16", **json.loads(json.dumps(defaults)), **renamed}


def base_fingerprint(base: str, revision: str | None = None) -> str:
    """A hash of the base's content: config.json, and each weight file's size and 64 samples.

    The first sample is the file's header. The name does not count, as a base may move; and
    gigabytes are not read. A base of the hub is downloaded with its weights, or its hash would be
    another one before they are there. Raises ConfigError where it cannot be read.
    """
    with config_errors_for(base):
        location = resolve_base(base, revision)["pretrained_model_name_or_path"]
        folder = fetch_base(location, revision)
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
    """A hash of the tokenizer's vocabulary, special tokens and chat template."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        str(tokenizer.special_tokens_map),
        str(tokenizer.chat_template),
    ]
    return _short_hash(json.dumps(content).encode())


def examples_fingerprint(examples: list[Example]) -> str:
    """A hash of what is trained on, after tokenizing: ids, tokens, and which are supervised."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.id.encode())
        digest.update(example.input_ids.tobytes())
        digest.update(example.labels.tobytes())
    return digest.hexdigest()[:16]


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
