"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from deepspeed.utils import set_z3_leaf_modules
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from .attention import IMPLEMENTATIONS
from .config import ROOT, Config, ConfigError
from .stream import stream_base
from .tokens import PLAIN_TEMPLATE


def resolve_base(base: str) -> dict[str, Any]:
    """Where to load from, as keyword arguments of `from_pretrained`. A local folder never touches the network."""
    for path in (Path(base), ROOT / base):
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ConfigError(f"base={base}: the folder has no config.json, so it is not a model in the hub's layout")
            return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ConfigError(f"base={base}: no such folder; give a folder in the hub's layout or a hub id (owner/name)")
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
        raise ConfigError(f"base={base}: cannot be loaded ({reason}). Without a network, copy the model's folder here (config.json, "
                          "tokenizer, *.safetensors) and set base=/path/to/folder") from error  # fmt: skip


def load_tokenizer(base: str, revision: str | None = None):
    """The base's tokenizer. One without a chat template gets a plain one at once: what is hashed, cached and handed out has it, too."""
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(**resolve_base(base), revision=revision)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def read_adapter(adapter: str) -> dict[str, Any]:
    """What an adapter folder says of itself: its base, and the revision, method, double_quant and dtype that it was trained with
    (an adapter from elsewhere says nothing of these: then this project's defaults)."""
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter}: no adapter_config.json there; give a run's adapter/ folder")
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead
        raise ConfigError(f"--adapter {adapter}: no adapter_model.safetensors there; give a run's adapter/ folder")
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        trained = json.loads((folder / "trained.json").read_text()) if (folder / "trained.json").is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--adapter {adapter}: adapter_config.json or trained.json is broken ({type(error).__name__})") from error
    return {"base": base, "revision": None, "method": "qlora", "double_quant": True, "dtype": "bfloat16"} | trained


def load_shape(base: str, revision: str | None = None):
    """The base's configuration: layers, hidden size, vocabulary; nothing heavy is read."""
    with loading(base):
        shape = AutoConfig.from_pretrained(**resolve_base(base), revision=revision)
    shape.head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return shape


def heads_of(shape) -> tuple[int, int, int]:
    """(of queries, of keys and values, their size)"""
    return shape.num_attention_heads, getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads, shape.head_dim


def dtype_of(ds: dict) -> torch.dtype:
    """The compute dtype, which ds_config.json owns."""
    return torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32


def nf4_config(dtype: torch.dtype, double_quant: bool = True) -> BitsAndBytesConfig:
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314). ZeRO-3 casts floating-point storage to the engine's dtype by value, which would
    garble packed codes: the storage is the engine's own dtype (so the cast is none), or bytes, which are never cast."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if dtype == torch.bfloat16 else torch.uint8,
    )  # fmt: skip


def load_base(
    base: str, dtype: torch.dtype, device, *, revision=None, quantized=True, double_quant=True, attention="sdpa", ds=None
) -> PreTrainedModel:
    """The causal language model, frozen weights in NF4 when `quantized`. With `ds`, an unquantised one is partitioned while it loads."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "revision": revision, "use_safetensors": True}  # no pickle
    if quantized:
        options |= {"quantization_config": nf4_config(dtype, double_quant), "device_map": {"": device}}
    elif ds is None:
        options |= {"device_map": {"": device}}
    with loading(base):
        return keep_codes(AutoModelForCausalLM.from_pretrained(**resolve_base(base), **options), dtype)


def keep_codes(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """NF4 codes stay what they are. bitsandbytes would repack them on CPUs with AVX512-BF16 at the first evaluation, and ZeRO-3's shards would be
    wrong. A base that was quantised elsewhere may store them as float16, which would be cast by value, and compute in another dtype than ours."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu, module.compute_dtype = False, dtype
            if module.weight.dtype not in (dtype, torch.uint8) and not hasattr(module.weight, "ds_id"):  # shards are not cast
                module.weight.data = module.weight.data.view(torch.uint8)
    return model


def attach_adapter(model: nn.Module, adapter: str, **options) -> PeftModel:
    """The model with the adapter of a folder on it. Raises ConfigError when it was made for another base."""
    try:
        return PeftModel.from_pretrained(model, adapter, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(f"--adapter {adapter}: does not fit this base, or is broken ({reason})") from error


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The stack of decoder layers, below PEFT's wrapping if there is one."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        return base.get_decoder().layers
    except AttributeError as error:
        raise ConfigError(f"{type(base).__name__} has no stack of decoder layers; take a base built like Llama") from error


def load_model(config: Config, ds: dict, device, attention: str, adapter: str | None = None) -> nn.Module:
    """The model as the engine gets it; only what shall be trained requires a gradient. With `adapter`, its LoRA weights are loaded.

    Every rank must come here with the same seed: LoRA's A matrices are drawn at random, and ranks share them by halves."""
    dtype, attention, model = dtype_of(ds), IMPLEMENTATIONS[attention], None
    if config.method == "qlora" and dist.get_world_size() > 1:  # else there is nothing to share
        with loading(config.base):
            model = stream_base(resolve_base(config.base), dtype, device, revision=config.revision, ds=ds, attention=attention,
                                quantization=nf4_config(dtype, config.double_quant))  # fmt: skip
    if model is None:
        # transformers partitions an unquantised base while loading as long as this object lives (it keeps a weak reference).
        alive = HfDeepSpeedConfig(ds) if config.method != "qlora" else None
        model = load_base(config.base, dtype, device, revision=config.revision, quantized=config.method == "qlora",
                          double_quant=config.double_quant, attention=attention, ds=ds)  # fmt: skip
        del alive
    if getattr(model, "_is_stateful", False):
        raise ConfigError(f"base={config.base}: a recurrent one, which carries a state from document to document; take one with attention alone")
    keep_codes(model, dtype).config.use_cache = False
    model.requires_grad_(config.method == "full")
    if config.method != "full":
        # The first layer's input must require a gradient: its weights don't, and checkpointing and leaf modules would see nothing to do.
        model.enable_input_require_grads()
        if adapter:
            model = attach_adapter(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
        else:
            try:
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora), autocast_adapter_dtype=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"lora: {str(error).splitlines()[0][:200]}") from error
    # ZeRO-3 hangs hooks on every sub-module; as leaf modules, decoder layers are gathered whole and cost one pair of hooks each.
    set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])
    return model


def use_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Gradient checkpointing (arXiv 1604.06174) of whole decoder layers, inside of ZeRO-3's hooks. Where transformers does it, in 5.20 for one, the
    hooks are inside, and what DeepSpeed gathers for a recomputation stays until the backward pass ends: at last every weight, on each rank. The
    reentrant kind: the other one keeps every gathered 4-bit weight alive (bitsandbytes#2034)."""

    def recomputed(forward, x: torch.Tensor, *args, **kwargs):
        call = partial(forward, **kwargs)
        return checkpoint(call, x, *args, use_reentrant=True) if torch.is_grad_enabled() else call(x, *args)

    for layer in decoder_layers(model):
        layer.forward = partial(recomputed, layer.forward)


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum, not mean, of the cross-entropies in nats, in fp32: the loop divides once by the targets of the whole step.

    logits [1, N, V], targets [N] with -100 where there is none. Returns a scalar; 0 with a gradient of 0 when no target counts."""
    return F.cross_entropy(logits.squeeze(0).float(), targets, ignore_index=-100, reduction="sum")


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
