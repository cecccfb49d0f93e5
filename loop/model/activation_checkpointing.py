"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

from functools import partial

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .structure import decoder_layers


def use_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Gradient checkpointing (arXiv 1604.06174) of whole decoder layers, inside of ZeRO-3's hooks. Where transformers does it, in 5.20 for one, the
    hooks are inside, and what DeepSpeed gathers for a recomputation stays until the backward pass ends: at last every weight, on each rank. The
    reentrant kind: the other one keeps every gathered 4-bit weight alive (bitsandbytes#2034)."""

    def recomputed(forward, x: torch.Tensor, *args, **kwargs):
        call = partial(forward, **kwargs)
        return (
            checkpoint(call, x, *args, use_reentrant=True)
            if torch.is_grad_enabled()
            else call(x, *args)
        )

    for layer in decoder_layers(model):
        layer.forward = partial(recomputed, layer.forward)
