"""How good the model is on a split: token-weighted loss, and its notes scored beside what they have to beat."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ..data.batch_plan import plan_batches, split_step
from ..data.collate import collate
from ..data.tokenization import Example
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from .scoring import ratio


@torch.no_grad()
def example_losses(
    engine, examples: list[Example], capacity: int, max_seq_len: int, ranks: Ranks, stop=None
) -> np.ndarray | None:
    """The cross-entropy of each example, summed over its supervised tokens, in nats, and their number: float64 [n, 2], the same on every
    rank. Every rank must call it; dropout is off meanwhile. capacity: tokens of a micro-batch. With `stop`, a StopRequest, it gives up and
    returns None when a rank is asked to end."""
    lengths = np.array([len(e) for e in examples])
    was_training = engine.module.training
    engine.module.eval()
    total = np.zeros((len(examples), 2))
    plan = plan_batches(lengths, capacity * ranks.world_size, seed=0)
    for step in range(len(plan)):
        set_activity(f"evaluating, batch {step + 1} of {len(plan)}")
        if stop and ranks.any(stop.requested):
            engine.module.train(was_training)
            return None
        for ids in split_step(plan[step], lengths, ranks.world_size, capacity)[ranks.rank]:
            batch = collate([examples[i] for i in ids], max_seq_len).to(ranks.device)
            logits = engine.module(**batch.model_inputs()).logits  # [1, N, V]
            losses = F.cross_entropy(
                logits.squeeze(0).float(), batch.targets, ignore_index=-100, reduction="none"
            ).double()  # [N]
            document = (
                torch.searchsorted(batch.cu_seqlens, batch.target_positions, right=True) - 1
            )  # [N], whose token it is
            sums = torch.zeros(
                len(batch.cu_seqlens) - 1, 2, dtype=torch.float64, device=ranks.device
            )
            sums.index_add_(0, document, torch.stack([losses, (batch.targets != -100).double()], 1))
            total[ids] += sums[: len(ids)].cpu().numpy()
    engine.module.train(was_training)
    return np.array(ranks.sum_scalars(*total.flatten())).reshape(-1, 2)


def evaluate_loss(
    engine, examples: list[Example], capacity: int, max_seq_len: int, ranks: Ranks, stop=None
) -> dict[str, float]:
    """Mean cross-entropy over all supervised tokens of `examples`, in nats, and its perplexity; {} when it was asked to stop, and without one.

    A mean of batch means would weigh a short note like a long one and change with the batch size; sums divided once don't. Arguments as in
    `example_losses`."""
    total = example_losses(engine, examples, capacity, max_seq_len, ranks, stop)
    if total is None or (loss := ratio(total)) is None:
        return {}
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}
