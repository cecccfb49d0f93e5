"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

import torch
import torch.nn.functional as F


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum, not mean, of the cross-entropies in nats, in fp32: the loop divides once by the targets of the whole step.

    logits [1, N, V], targets [N] with -100 where there is none. Returns a scalar; 0 with a gradient of 0 when no target counts."""
    return F.cross_entropy(logits.squeeze(0).float(), targets, ignore_index=-100, reduction="sum")
