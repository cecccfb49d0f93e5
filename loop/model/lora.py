"""An adapter's folder: what it was trained on, and how it is put on a base again."""

import json
from pathlib import Path
from typing import Any

import torch.nn as nn
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError

from ..config.schema import ConfigError
from ..distributed.files import sha256
from ..kernels.quantization import QUANTIZATIONS

WEIGHTS = "adapter_model.safetensors"
# Fields of LoraConfig that decide what an adapter's weights mean.
SHAPE = (
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
# What an adapter from elsewhere does not tell.
DEFAULTS = {"revision": None, "method": "qlora", "double_quant": True, "dtype": "bfloat16"}


def read_adapter(adapter: str, option: str = "--adapter ") -> dict[str, Any]:
    """What an adapter's folder says of its training: the base, and how the base was stored.

    The keys are those of trained.json: base, revision, method, double_quant, dtype, and of a run's
    own adapter also storage, base_fingerprint, generation and sha256. An adapter from elsewhere
    only names its base; the rest is this project's defaults. Raises ConfigError where there is no
    adapter; option: how it was named, for the message.
    """
    folder = Path(adapter)
    # PEFT would take a pickle instead of the second.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{option}{adapter}: no {name} there; give a run's adapter/ folder")
    trained = {}
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        if (folder / "trained.json").is_file():
            trained = json.loads((folder / "trained.json").read_text())
        return {"base": base} | DEFAULTS | trained
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{option}{adapter}: adapter_config.json or trained.json is broken "
            f"({type(error).__name__})"
        ) from error


def trained_quantization(trained: dict[str, Any]) -> str | None:
    """The quantisation of the base that an adapter was trained on; None: plain weights.

    trained: of `read_adapter`. Adapters of older runs and of other projects don't name the storage.
    """
    default = "nf4" if trained["method"] == "qlora" else None
    storage = trained.get("storage", default)
    return storage if storage in QUANTIZATIONS else None


def attach_adapter(model: nn.Module, adapter: str, **options) -> PeftModel:
    """The model with the adapter of a folder on it. options: of `PeftModel.from_pretrained`.

    Raises ConfigError when the adapter was made for another base.
    """
    try:
        return PeftModel.from_pretrained(model, adapter, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(
            f"--adapter {adapter}: does not fit this base, or is broken ({reason})"
        ) from error


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
    for key in SHAPE:
        values = [own[key], theirs.get(key, own[key])]
        if key == "target_modules" and not all(isinstance(v, (list, set)) for v in values):
            continue
        mine, other = (sorted(v) if isinstance(v, (list, set)) else v for v in values)
        if mine != other:
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
        "data": trained.get("data", {}).get("train", {}).get("fingerprint"),
        "prompt": (trained.get("prompt") or {}).get("sha256"),
    }
    known = {key: value for key, value in facts.items() if value is not None}
    return [known, *trained.get("started_from", [])]
