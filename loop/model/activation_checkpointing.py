"""Activation checkpointing (arXiv 1604.06174) that works under ZeRO-3 on 4-bit weights."""

from functools import partial

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .structure import decoder_layers


def use_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Lets every decoder layer recompute its activations in the backward pass.

    The recomputation is inside of ZeRO-3's hooks. transformers, in 5.20 for one, has the hooks
    inside of the recomputation. Then what DeepSpeed gathers for it stays until the backward pass
    ends: at last every weight, on each rank.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpointed_forward, layer.forward)


def checkpointed_forward(forward, x: torch.Tensor, *args, **kwargs):
    """forward(x, ...), of which only the inputs are stored for the backward pass.

    The reentrant kind: the other one keeps every gathered 4-bit weight alive (bitsandbytes#2034).
    """
    call = partial(forward, **kwargs)
    if not torch.is_grad_enabled():
        return call(x, *args)
    return checkpoint(call, x, *args, use_reentrant=True)
