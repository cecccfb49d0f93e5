"""The loss that is minimised, before the loop divides it."""

import torch
import torch.nn.functional as F


def summed_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """The sum, not the mean, of the cross-entropies in nats: an fp32 scalar.

    The loop divides once, by the number of targets of the whole step. Without a target the sum is 0
    and so is its gradient.

    Args:
        logits: [1, N, V].
        targets: int64 [N], -100 where there is none.
        chunk: above so many logits they are not all converted to fp32 at once; None: they are. The
            gradient is the same; the sum may differ in its last bits.
    """
    logits = logits.squeeze(0)
    if chunk is None or logits.numel() <= chunk:
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return _ChunkedCrossEntropy.apply(logits, targets, max(1, chunk // logits.shape[-1]))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The same from a few rows at a time; the probabilities are computed again for the gradient."""

    @staticmethod
    def forward(ctx, logits, targets, rows: int):
        ctx.save_for_backward(logits, targets)
        ctx.rows = rows
        losses = [
            F.cross_entropy(some.float(), wanted, ignore_index=-100, reduction="sum")
            for some, wanted in zip(logits.split(rows), targets.split(rows))
        ]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, dy):
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = (tensor.split(ctx.rows) for tensor in (logits, targets, gradient))
        for some, wanted, out in zip(*parts):
            supervised = wanted != -100
            # The probabilities, less 1 at the target.
            difference = some.float().softmax(-1)
            at = wanted.where(supervised, 0)[:, None]
            difference.scatter_add_(-1, at, torch.full_like(at, -1, dtype=torch.float32))
            out.copy_(difference * (dy * supervised[:, None]))
        return gradient, None, None
