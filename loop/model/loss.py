"""The loss that is minimised, before the loop divides it."""

import torch
import torch.nn.functional as F


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum, not the mean, of the cross-entropies in nats: an fp32 scalar.

    The loop divides once, by the number of targets of the whole step. Without a target the sum is 0
    and so is its gradient.

    logits: [1, N, V]; targets: int64 [N], -100 where there is none.
    """
    return F.cross_entropy(logits.squeeze(0).float(), targets, ignore_index=-100, reduction="sum")
