"""An adapter's folder: what it was trained on, and how it is put on a base again."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from pydantic import ValidationError

from ..config.error_text import first_line
from ..config.lora_fields import HIGHEST_RANK
from ..config.schema import ConfigError, GenerationSettings, check_path
from ..distributed.files import sha256
from ..kernels.quantization import QUANTIZATIONS
from ..untrusted.limits import limited

WEIGHTS = "adapter_model.safetensors"
# Fields of LoraConfig that decide what an adapter's weights mean.
COMPARED_FIELDS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "layers_to_transform",
    "target_modules",
)
# Of trained.json: what stands there, if it does, and is not null.
TRAINED_TYPES: dict[str, type] = {
    **dict.fromkeys(("data", "generation", "prompt", "figures", "recipe", "versions"), dict),
    **dict.fromkeys(("base", "method", "dtype", "revision", "storage"), str),
    **dict.fromkeys(("base_fingerprint", "sha256", "merged_into", "adapter_sha256", "gguf"), str),
    **dict.fromkeys(("steps", "planned_steps", "tokens", "supervised_tokens"), int),
    "max_seq_len": int,
    "double_quant": bool,
    "started_from": list,
}
NEVER_NULL = ("base", "method", "dtype", "double_quant")
# Where null is an answer: no revision was named; the rows brought their own prompts.
NULL_ANSWERS = ("revision", "prompt")
# Inside of it, as the card tells it.
NESTED_TYPES: dict[tuple[str, ...], type] = {
    ("recipe", "lora"): dict,
    ("figures", "evaluate"): dict,
    ("figures", "validation_loss"): float,
    **{("data", split, "examples"): int for split in ("train", "valid")},
    ("data", "train", "fingerprint"): str,
    ("prompt", "sha256"): str,
    ("prompt", "chat_template_sha256"): str,
}
LONGEST_TEXT = 2000  # characters of a name or a hash
LONGEST_FILE = 2**22  # bytes of a file that describes an adapter
LONGEST_CHAIN = 1000  # adapters that one was trained on from
PER_PROMPT = ("alora_invocation_tokens", "arrow_config")  # fields of LoraConfig
# What an adapter from elsewhere does not tell.
DEFAULTS = {"revision": None, "method": "qlora", "double_quant": True, "dtype": "bfloat16"}


def read_adapter(adapter: str, option: str = "--adapter ") -> dict[str, Any]:
    """What an adapter's folder says of its training: the base, and how the base was stored.

    The keys are those of trained.json: base, revision, method, double_quant, dtype, and of a run's
    own adapter also storage, base_fingerprint, generation and sha256. A null there says as much as
    no key, but in NULL_ANSWERS. An adapter from elsewhere only names its base; the rest is this
    project's defaults. Raises ConfigError where there is no adapter, or one of another kind than
    LoRA for a language model; option: how it was named, for the message.
    """
    check_path(option.strip(" ="), adapter)
    folder = Path(adapter)
    # PEFT would take a pickle instead of the second.
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{option}{adapter}: no {name} there; give a run's adapter/ folder")
    trained = {}
    try:
        written = _read_description(f"{option}{adapter}", folder / "adapter_config.json")
        check_is_lora(f"{option}{adapter}", written)
        check_peft_reads(f"{option}{adapter}", folder)
        if (folder / "trained.json").is_file():
            trained = _read_description(f"{option}{adapter}", folder / "trained.json")
        trained = {"base": written["base_model_name_or_path"]} | DEFAULTS | trained
        check_trained(f"{option}{adapter}", trained)
        return without_nulls(trained)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{option}{adapter}: adapter_config.json or trained.json is broken "
            f"({type(error).__name__})"
        ) from error


def _read_description(named: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file of an adapter. Raises ConfigError for a huge one, and TypeError."""
    if path.stat().st_size > LONGEST_FILE:
        raise ConfigError(f"{named}: {path.name} has more than {LONGEST_FILE:,} bytes")
    written = json.loads(path.read_text())
    if not isinstance(written, dict):
        raise TypeError
    return written


def check_is_lora(named: str, written: dict[str, Any]) -> None:
    """Raises ConfigError for an adapter_config.json that PEFT would read as something else.

    Other kinds of adapters change more than linear layers; `auto_mapping` names a module to import.
    """
    for key, ours in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("auto_mapping", None)):
        if written.get(key) not in (ours, None):
            raise ConfigError(
                f"{named}: adapter_config.json: {key}={str(written[key])[:60]!r}; only "
                "LoRA of a causal language model is read"
            )
    for key in PER_PROMPT:
        if written.get(key):
            raise ConfigError(
                f"{named}: adapter_config.json: {key}={str(written[key])[:60]!r}: is a variant of "
                "LoRA whose weights depend on the prompt; only those that do not are read"
            )
    rank = written.get("r", 8)
    if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
        raise ConfigError(
            f"{named}: adapter_config.json: r={str(rank)[:60]}: must lie between 1 and "
            f"{HIGHEST_RANK}"
        )


def check_peft_reads(named: str, folder: Path) -> None:
    """Raises ConfigError for an adapter_config.json that peft.LoraConfig refuses."""
    try:
        LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises anything at a field that does not fit
        raise ConfigError(
            f"{named}: adapter_config.json: peft.LoraConfig refuses it ({first_line(error, 160)})"
        ) from error


def without_nulls(trained: dict[str, Any]) -> dict[str, Any]:
    """The content of trained.json without the keys that say nothing."""
    return {k: v for k, v in trained.items() if v is not None or k in NULL_ANSWERS}


def check_trained(named: str, trained: dict[str, Any]) -> None:
    """Raises ConfigError where trained.json holds what no run writes."""
    wrong = [key for key in NEVER_NULL if trained[key] is None]
    for key, kind in TRAINED_TYPES.items():
        value = trained.get(key)
        if value is not None and not _is_of(value, kind):
            wrong.append(key)
    if trained["dtype"] not in ("float32", "bfloat16", "float16"):
        wrong.append("dtype")
    data = trained.get("data") or {}
    if "data" not in wrong and not all(isinstance(split, dict) for split in data.values()):
        wrong.append("data")
    starts = trained.get("started_from") or []
    if "started_from" not in wrong and not _is_chain(starts):
        wrong.append("started_from")
    if not wrong:
        check_nested(named, trained)
    if wrong:
        raise ConfigError(
            f"{named}: adapter_config.json or trained.json: "
            f"{wrong[0]}={str(trained[wrong[0]])[:60]!r} can't be used"
        )
    try:
        GenerationSettings(**trained.get("generation") or {})
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        key = ".".join(map(str, mistake["loc"]))
        raise ConfigError(f"{named}: trained.json: generation: {key}: {mistake['msg']}") from error


def check_nested(named: str, trained: dict[str, Any]) -> None:
    """Raises ConfigError where a part of trained.json holds a value that the card can't tell."""
    for keys, kind in NESTED_TYPES.items():
        value: Any = trained
        for key in keys:
            value = (value or {}).get(key)
        if value is not None and not _is_of(value, kind):
            raise ConfigError(
                f"{named}: trained.json: {'.'.join(keys)}={str(value)[:60]!r} can't be used"
            )


def _is_of(value: Any, kind: type) -> bool:
    """Whether a value is of a type of JSON: a boolean is no number, and a name is no long text."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and 0 <= value < 2**63
    if isinstance(value, str):
        return kind is str and len(value) <= LONGEST_TEXT
    return isinstance(value, kind)


def _is_chain(starts: list[Any]) -> bool:
    """Whether these are the adapters of `describe_start`."""
    texts = ("sha256", "data", "prompt")
    return len(starts) <= LONGEST_CHAIN and all(
        isinstance(start, dict)
        and _is_of(start.get("steps", 0), int)
        and "sha256" in start
        and all(_is_of(start.get(key, ""), str) for key in texts)
        for start in starts
    )


def is_as_written(folder: Path, trained: dict[str, Any]) -> bool:
    """False where the weights are not those that the run wrote. One from elsewhere has no hash.

    trained: of `read_adapter`.
    """
    return "sha256" not in trained or trained["sha256"] == sha256(folder / WEIGHTS)


def trained_quantization(trained: dict[str, Any]) -> str | None:
    """The quantisation of the base that an adapter was trained on; None: plain weights.

    trained: of `read_adapter`. Adapters of older runs and of other projects don't name the storage.
    """
    default = "nf4" if trained["method"] == "qlora" else None
    storage = trained.get("storage", default)
    return storage if storage in QUANTIZATIONS else None


def attach_adapter(model: nn.Module, adapter: str, **options) -> PeftModel:
    """The model with the adapter of a folder on it. options: of `PeftModel.from_pretrained`.

    Raises ConfigError when the adapter was made for another base, lacks weights, holds NaN, or is
    damaged.
    """
    if not is_as_written(Path(adapter), read_adapter(adapter)):
        raise ConfigError(
            f"--adapter {adapter}: {WEIGHTS} is not the file that the run wrote (its hash "
            "differs); copy or train it again"
        )
    try:
        check_patterns(model, json.loads((Path(adapter) / "adapter_config.json").read_text()))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            attached = PeftModel.from_pretrained(model, adapter, **options)
        own = (weight for name, weight in attached.named_parameters() if ".lora_" in name)
        if not all(bool(weight.isfinite().all()) for weight in own):
            raise ValueError("its weights are no finite numbers")
        return attached
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT and transformers raise anything at a file that is broken
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(
            f"--adapter {adapter}: does not fit this base, or is broken ({reason})"
        ) from error


def check_patterns(model: nn.Module, written: dict[str, Any]) -> None:
    """Matches the regular expressions of an adapter_config.json with the names of the modules.

    Raises LimitError for one that explodes: PEFT would go on for ever.
    """
    patterns = [written.get(key) for key in ("target_modules", "exclude_modules")]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += written.get(key) or {}
    with limited():
        for pattern in filter(None, patterns):
            for name, _ in model.named_modules() if isinstance(pattern, str) else ():
                re.fullmatch(pattern, name)


def check_start(adapter: str, lora: dict[str, Any], base_fingerprint: str) -> str:
    """Checks that a run can train on from an adapter; returns the SHA-256 of its weights, in hex.

    Raises ConfigError where its files are not those of its run, where it is of another base, or
    where its LoRA is not the run's. target_modules that are no list are compared when the weights
    are loaded.

    Args:
        lora: the run's fields of LoraConfig.
        base_fingerprint: of the run's base.
    """
    named = f"adapter={adapter}"
    trained = read_adapter(adapter, "adapter=")
    weights = sha256(Path(adapter) / WEIGHTS)
    if trained.get("sha256", weights) != weights:
        raise ConfigError(f"{named}: {WEIGHTS} is not the file that its run wrote; copy it again")
    if trained.get("base_fingerprint", base_fingerprint) != base_fingerprint:
        raise ConfigError(
            f"{named}: was trained on another base, {trained['base']}; set base to that one"
        )
    theirs = json.loads((Path(adapter) / "adapter_config.json").read_text())
    if theirs.get("peft_type") != "LORA":
        raise ConfigError(f"{named}: is of the kind {theirs.get('peft_type')}, not LORA")
    own = LoraConfig(task_type="CAUSAL_LM", **lora).to_dict()
    for key in COMPARED_FIELDS:
        values = [own[key], theirs.get(key, own[key])]
        if key == "target_modules" and not all(isinstance(v, (list, set)) for v in values):
            continue
        mine, other = (sorted(v) if isinstance(v, (list, set)) else v for v in values)
        if mine != other:
            other = str(other)[:200]
            raise ConfigError(
                f"{named}: has lora.{key}={other}, and this run {mine}; set lora.{key}={other}"
            )
    return weights


def load_start(model: nn.Module, adapter: str) -> None:
    """Puts an adapter's weights into the model's new LoRA layers.

    Raises ConfigError where it has more, fewer or other weights than they.
    """
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = load_peft_weights(adapter, device="cpu")
    for name in sorted({*own, *weights}):
        shapes = [list(w[name].shape) if name in w else None for w in (own, weights)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"adapter={adapter}: its {name} has the shape {shapes[1]}, that of this run "
                f"{shapes[0]}; set lora.target_modules to the adapter's"
            )
    set_peft_model_state_dict(model, weights)


def describe_start(adapter: str) -> list[dict[str, Any]]:
    """The adapters that a run goes on from, the newest first, as trained.json tells them.

    Of each the hash of its weights, and where a run of this project trained it, its steps and the
    hashes of its training data and prompt. Raises ConfigError where there is no adapter.
    """
    trained = read_adapter(adapter, "adapter=")
    facts = {
        "sha256": sha256(Path(adapter) / WEIGHTS),
        "steps": trained.get("steps"),
        "data": (trained.get("data") or {}).get("train", {}).get("fingerprint"),
        "prompt": (trained.get("prompt") or {}).get("sha256"),
    }
    known = {key: value for key, value in facts.items() if value is not None}
    return [known, *(trained.get("started_from") or [])]
