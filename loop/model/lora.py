"""An adapter's folder: what it was trained on, and how it is put on a base again."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from peft import PeftModel

from ..config.lora_fields import HIGHEST_RANK
from ..config.schema import ConfigError
from ..distributed.files import sha256
from ..kernels.quantization import QUANTIZATIONS

WEIGHTS = "adapter_model.safetensors"
# What an adapter from elsewhere does not tell.
DEFAULTS = {"revision": None, "method": "qlora", "double_quant": True, "dtype": "bfloat16"}


def read_adapter(adapter: str) -> dict[str, Any]:
    """What an adapter's folder says of its training: the base, and how the base was stored.

    The keys are those of trained.json: base, revision, method, double_quant, dtype, and of a run's
    own adapter also storage, base_fingerprint, generation and sha256. An adapter from elsewhere
    only names its base; the rest is this project's defaults. Raises ConfigError where there is no
    adapter, or one of another kind than LoRA for a language model.
    """
    folder = Path(adapter)
    # PEFT would take a pickle instead of the second.
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"--adapter {adapter}: no {name} there; give a run's adapter/ folder")
    trained = {}
    try:
        written = json.loads((folder / "adapter_config.json").read_text())
        check_is_lora(adapter, written)
        if (folder / "trained.json").is_file():
            trained = json.loads((folder / "trained.json").read_text())
        trained = {"base": written["base_model_name_or_path"]} | DEFAULTS | trained
        check_trained(adapter, trained)
        return trained
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"--adapter {adapter}: adapter_config.json or trained.json is broken "
            f"({type(error).__name__})"
        ) from error


def check_is_lora(adapter: str, written: dict[str, Any]) -> None:
    """Raises ConfigError for an adapter_config.json that PEFT would read as something else.

    Other kinds of adapters change more than linear layers; `auto_mapping` names a module to import.
    """
    for key, ours in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("auto_mapping", None)):
        if written.get(key) not in (ours, None):
            raise ConfigError(
                f"--adapter {adapter}: adapter_config.json: {key}={str(written[key])[:60]!r}; only "
                "LoRA of a causal language model is read"
            )
    rank = written.get("r", 8)
    if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
        raise ConfigError(
            f"--adapter {adapter}: adapter_config.json: r={str(rank)[:60]}: must lie between 1 and "
            f"{HIGHEST_RANK}"
        )


def check_trained(adapter: str, trained: dict[str, Any]) -> None:
    """Raises ConfigError where trained.json holds what no run writes."""
    texts = ("base", "method", "dtype")
    wrong = [key for key in texts if not isinstance(trained[key], str)]
    if trained["revision"] is not None and not isinstance(trained["revision"], str):
        wrong.append("revision")
    if not isinstance(getattr(torch, str(trained["dtype"]), None), torch.dtype):
        wrong.append("dtype")
    if wrong:
        raise ConfigError(
            f"--adapter {adapter}: adapter_config.json or trained.json: "
            f"{wrong[0]}={str(trained[wrong[0]])[:60]!r} can't be used"
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

    Raises ConfigError when the adapter was made for another base, or is damaged.
    """
    if not is_as_written(Path(adapter), read_adapter(adapter)):
        raise ConfigError(
            f"--adapter {adapter}: {WEIGHTS} is not the file that the run wrote (its hash "
            "differs); copy or train it again"
        )
    try:
        return PeftModel.from_pretrained(model, adapter, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT and transformers raise anything at a file that is broken
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(
            f"--adapter {adapter}: does not fit this base, or is broken ({reason})"
        ) from error
