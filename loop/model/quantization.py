"""What the engine computes with: the dtype of the run, and codes of frozen weights that stay.

The kinds of quantisation themselves are in kernels/quantization.py.
"""

import torch
from transformers import PreTrainedModel

from ..kernels.quantization import find_quantization


def compute_dtype(ds_config: dict) -> torch.dtype:
    """The dtype of activations and unquantised weights, which ds_config.json owns."""
    if ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float32


def keep_codes(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Protects the codes of all quantised layers from being repacked or cast; returns the model."""
    for module in model.modules():
        if quantization := find_quantization(module):
            quantization.keep_codes(module, dtype)
    return model
