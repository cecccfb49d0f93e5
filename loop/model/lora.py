"""An adapter's folder: what it was trained on, and how it is put on a base again."""

import json
from pathlib import Path
from typing import Any

import torch.nn as nn
from peft import PeftModel
from safetensors import SafetensorError

from ..config.schema import ConfigError
from ..kernels.quantization import QUANTIZATIONS

# What an adapter from elsewhere does not tell.
DEFAULTS = {"revision": None, "method": "qlora", "double_quant": True, "dtype": "bfloat16"}


def read_adapter(adapter: str) -> dict[str, Any]:
    """What an adapter's folder says of its training: the base, and how the base was stored.

    The keys are those of trained.json: base, revision, method, double_quant, dtype, and of a run's
    own adapter also storage, base_fingerprint, generation and sha256. An adapter from elsewhere
    only names its base; the rest is this project's defaults. Raises ConfigError where there is no
    adapter.
    """
    folder = Path(adapter)
    # PEFT would take a pickle instead of the second.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"--adapter {adapter}: no {name} there; give a run's adapter/ folder")
    trained = {}
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        if (folder / "trained.json").is_file():
            trained = json.loads((folder / "trained.json").read_text())
        return {"base": base} | DEFAULTS | trained
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--adapter {adapter}: adapter_config.json or trained.json is broken "
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
