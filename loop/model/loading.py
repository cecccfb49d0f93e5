"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from deepspeed.utils import set_z3_leaf_modules
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from ..config.schema import ROOT, Config, ConfigError
from ..data.tokenization import PLAIN_TEMPLATE
from ..kernels.attention import ATTENTION_BACKENDS
from .lora import attach_adapter
from .quantization import dtype_of, keep_codes, nf4_config
from .streaming import stream_base
from .structure import decoder_layers


def resolve_base(base: str) -> dict[str, Any]:
    """Where to load from, as keyword arguments of `from_pretrained`. A local folder never touches the network."""
    for path in (Path(base), ROOT / base):
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ConfigError(
                    f"base={base}: the folder has no config.json, so it is not a model in the hub's layout"
                )
            return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ConfigError(
            f"base={base}: no such folder; give a folder in the hub's layout or a hub id (owner/name)"
        )
    return {"pretrained_model_name_or_path": base}


@contextlib.contextmanager
def loading(base: str):
    """Turns a failed load into one line that says how to go on without the hub."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise  # it says what is wrong
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        raise ConfigError(
            f"base={base}: cannot be loaded ({reason}). Without a network, copy the model's folder here (config.json, "
            "tokenizer, *.safetensors) and set base=/path/to/folder"
        ) from error


def load_tokenizer(base: str, revision: str | None = None):
    """The base's tokenizer. One without a chat template gets a plain one at once: what is hashed, cached and handed out has it, too."""
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(**resolve_base(base), revision=revision)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def load_model_config(base: str, revision: str | None = None):
    """The base's configuration: layers, hidden size, vocabulary; nothing heavy is read."""
    with loading(base):
        shape = AutoConfig.from_pretrained(**resolve_base(base), revision=revision)
    shape.head_dim = (
        getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    )
    return shape


def load_base(
    base: str,
    dtype: torch.dtype,
    device,
    *,
    revision=None,
    quantized=True,
    double_quant=True,
    attention="sdpa",
    ds=None,
) -> PreTrainedModel:
    """The causal language model, frozen weights in NF4 when `quantized`. With `ds`, an unquantised one is partitioned while it loads."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "revision": revision,
        "use_safetensors": True,
    }  # no pickle
    if quantized:
        options |= {
            "quantization_config": nf4_config(dtype, double_quant),
            "device_map": {"": device},
        }
    elif ds is None:
        options |= {"device_map": {"": device}}
    with loading(base):
        return keep_codes(
            AutoModelForCausalLM.from_pretrained(**resolve_base(base), **options), dtype
        )


def load_model(
    config: Config, ds: dict, device, attention: str, adapter: str | None = None
) -> nn.Module:
    """The model as the engine gets it; only what shall be trained requires a gradient. With `adapter`, its LoRA weights are loaded.

    Every rank must come here with the same seed: LoRA's A matrices are drawn at random, and ranks share them by halves."""
    dtype, attention, model = dtype_of(ds), ATTENTION_BACKENDS[attention].transformers_name, None
    if config.method == "qlora" and dist.get_world_size() > 1:  # else there is nothing to share
        with loading(config.base):
            model = stream_base(
                resolve_base(config.base),
                dtype,
                device,
                revision=config.revision,
                ds=ds,
                attention=attention,
                quantization=nf4_config(dtype, config.double_quant),
            )
    if model is None:
        # transformers partitions an unquantised base while loading as long as this object lives (it keeps a weak reference).
        alive = HfDeepSpeedConfig(ds) if config.method != "qlora" else None
        model = load_base(
            config.base,
            dtype,
            device,
            revision=config.revision,
            quantized=config.method == "qlora",
            double_quant=config.double_quant,
            attention=attention,
            ds=ds,
        )
        del alive
    if getattr(model, "_is_stateful", False):
        raise ConfigError(
            f"base={config.base}: a recurrent one, which carries a state from document to document; take one with attention alone"
        )
    keep_codes(model, dtype).config.use_cache = False
    model.requires_grad_(config.method == "full")
    if config.method != "full":
        # The first layer's input must require a gradient: its weights don't, and checkpointing and leaf modules would see nothing to do.
        model.enable_input_require_grads()
        if adapter:
            model = attach_adapter(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
        else:
            try:
                model = get_peft_model(
                    model,
                    LoraConfig(task_type="CAUSAL_LM", **config.lora),
                    autocast_adapter_dtype=False,
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(f"lora: {str(error).splitlines()[0][:200]}") from error
    # ZeRO-3 hangs hooks on every sub-module; as leaf modules, decoder layers are gathered whole and cost one pair of hooks each.
    set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])
    return model
