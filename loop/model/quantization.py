"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel


def dtype_of(ds: dict) -> torch.dtype:
    """The compute dtype, which ds_config.json owns."""
    return torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32


def nf4_config(dtype: torch.dtype, double_quant: bool = True) -> BitsAndBytesConfig:
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314). ZeRO-3 casts floating-point storage to the engine's dtype by value, which would
    garble packed codes: the storage is the engine's own dtype (so the cast is none), or bytes, which are never cast."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if dtype == torch.bfloat16 else torch.uint8,
    )


def keep_codes(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """NF4 codes stay what they are. bitsandbytes would repack them on CPUs with AVX512-BF16 at the first evaluation, and ZeRO-3's shards would be
    wrong. A base that was quantised elsewhere may store them as float16, which would be cast by value, and compute in another dtype than ours."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu, module.compute_dtype = False, dtype
            if module.weight.dtype not in (dtype, torch.uint8) and not hasattr(
                module.weight, "ds_id"
            ):  # shards are not cast
                module.weight.data = module.weight.data.view(torch.uint8)
    return model
