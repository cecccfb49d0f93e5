"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

import json
from pathlib import Path
from typing import Any

import torch.nn as nn
from peft import PeftModel
from safetensors import SafetensorError

from ..config.schema import ConfigError


def read_adapter(adapter: str) -> dict[str, Any]:
    """What an adapter folder says of itself: its base, and the revision, method, double_quant and dtype that it was trained with
    (an adapter from elsewhere says nothing of these: then this project's defaults)."""
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"--adapter {adapter}: no adapter_config.json there; give a run's adapter/ folder"
        )
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead
        raise ConfigError(
            f"--adapter {adapter}: no adapter_model.safetensors there; give a run's adapter/ folder"
        )
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        trained = (
            json.loads((folder / "trained.json").read_text())
            if (folder / "trained.json").is_file()
            else {}
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--adapter {adapter}: adapter_config.json or trained.json is broken ({type(error).__name__})"
        ) from error
    return {
        "base": base,
        "revision": None,
        "method": "qlora",
        "double_quant": True,
        "dtype": "bfloat16",
    } | trained


def attach_adapter(model: nn.Module, adapter: str, **options) -> PeftModel:
    """The model with the adapter of a folder on it. Raises ConfigError when it was made for another base."""
    try:
        return PeftModel.from_pretrained(model, adapter, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(
            f"--adapter {adapter}: does not fit this base, or is broken ({reason})"
        ) from error
