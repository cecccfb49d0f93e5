"""The loss of a split: a mean over supervised tokens, whatever the batches and the ranks."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ..data.batch_plan import PackingSpec, plan_batches, split_step
from ..data.collate import PackedBatch, collate
from ..data.tokenization import Example
from ..distributed.progress import track
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from .scoring import ratio


@torch.no_grad()
def example_losses(
    engine, examples: list[Example], packing: PackingSpec, ranks: Ranks, stop=None
) -> np.ndarray | None:
    """The summed cross-entropy of each example, in nats, and its number of supervised tokens.

    Returns float64 [n, 2], equal on all ranks. Every rank must call it. Dropout is off meanwhile.
    With `stop`, a StopRequest, it returns None as soon as a rank is asked to stop.
    """
    lengths = np.array([len(e) for e in examples])
    was_training = engine.module.training
    engine.module.eval()
    order: list[int] = []  # of the examples in `sums`
    sums: list[torch.Tensor] = []
    plan = plan_batches(lengths, packing.max_tokens * ranks.world_size, seed=0)
    for step in track(range(len(plan)), "evaluating", "batches"):
        set_activity(f"evaluating, batch {step + 1} of {len(plan)}")
        if stop and ranks.any(stop.requested):
            engine.module.train(was_training)
            return None
        for ids in split_step(plan[step], lengths, ranks.world_size, packing)[ranks.rank]:
            batch = collate([examples[i] for i in ids], packing).to(ranks.device)
            logits = engine.module(**batch.model_inputs()).logits  # [1, N, V]
            order += ids
            sums.append(document_losses(logits, batch)[: len(ids)])
    engine.module.train(was_training)
    totals = np.zeros((len(examples), 2))
    totals[order] = torch.cat(sums).cpu().numpy()  # at the end: a GPU need not wait between batches
    return np.array(ranks.sum_scalars(*totals.flatten())).reshape(-1, 2)


def document_losses(logits: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """(summed cross-entropy, supervised tokens) of each document of a row: float64 [documents, 2].

    logits: [1, N, V], of the batch's N target positions.
    """
    losses = F.cross_entropy(
        logits.squeeze(0).float(), batch.targets, ignore_index=-100, reduction="none"
    ).double()  # [N]
    supervised = (batch.targets != -100).double()
    document = torch.searchsorted(batch.cu_seqlens, batch.target_positions, right=True) - 1  # [N]
    documents = len(batch.cu_seqlens) - 1
    sums = torch.zeros(documents, 2, dtype=torch.float64, device=logits.device)
    return sums.index_add_(0, document, torch.stack([losses, supervised], 1))


def evaluate_loss(
    engine, examples: list[Example], packing: PackingSpec, ranks: Ranks, stop=None
) -> dict[str, float]:
    """The mean cross-entropy over all supervised tokens of `examples`, in nats, and its perplexity.

    Returns {} without examples, and when a rank was asked to stop. A mean of batch means would give
    a short note the weight of a long one and change with the batch size. Arguments are those of
    `example_losses`.
    """
    totals = example_losses(engine, examples, packing, ranks, stop)
    loss = None if totals is None else ratio(totals)
    if loss is None:
        return {}
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}
