"""The run's side of CUDA graphs: when decoder layers are captured, for rows of which size.

`kernels/cuda_graphs.py` captures and replays. Graphs have fixed addresses, so they need weights
that stay on each rank, and rows of one size, which `collate` pads.
"""

import numpy as np
import torch.nn as nn

from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec, split_step
from ..distributed.world import Ranks
from ..kernels import cuda_graphs
from ..kernels.cuda_graphs import graph_layers
from ..kernels.dropout import DropoutMasks
from ..memory.measure import graph_pools
from .structure import decoder_layers

MAX_EXAMPLES = 100_000  # of the plan that the row size is made for; splitting them takes a second


def can_replay(config: Config, replicated: bool, ranks: Ranks, backend: str) -> bool:
    """Whether layers that do not recompute their activations will be CUDA graphs.

    They will on GPUs whose ranks hold all weights, with attention that does not ask the GPU for the
    documents' bounds. Every rank must call it, and gets the same answer, as steps are split by it.
    """
    on_gpu = ranks.device.type == "cuda"
    return ranks.all(config.cuda_graphs and replicated and on_gpu and backend != "sdpa")


def replay_layers(
    max_seq_len: int,
    model: nn.Module,
    plan: BatchPlan,
    lengths: np.ndarray,
    max_tokens: int,
    dropout: DropoutMasks,
    ranks: Ranks,
) -> tuple[int, tuple[int, int] | None, str]:
    """Captures the decoder layers of an engine's model, so that steps replay them.

    Returns (max_tokens, padded_shape, warning): the tokens of a micro-batch that steps are split
    for, equal on all ranks; the (tokens, documents) that each row has to be padded to, None where
    nothing was captured; and why nothing was captured on this rank, or "".

    Args:
        max_seq_len: tokens of the longest possible example.
        lengths: int [n], tokens of every example of the run.
        max_tokens: of a micro-batch, as the memory allows.
        dropout: LoRA's masks, which get an address for rows of this size.
    """
    padded_shape = padded_shape_of(plan, lengths, ranks.world_size, max_tokens, max_seq_len)
    tokens, _ = padded_shape
    dropout.reserve(tokens)
    layers = decoder_layers(model)
    problem = graph_layers(model, layers, padded_shape, max_seq_len, ranks.device)
    if problem:
        warning = f"layers      launched kernel by kernel, not replayed: {problem}"
        return tokens, None, f"{warning} (rank {ranks.rank})"
    graph_pools.update()
    return tokens, padded_shape, ""


def padded_shape_of(
    plan: BatchPlan, lengths: np.ndarray, world_size: int, max_tokens: int, max_seq_len: int
) -> tuple[int, int]:
    """(tokens, documents) of a row that holds each micro-batch of the plan and its padding.

    On several ranks a row has less than `max_tokens`, as steps are split evenly. Only the first
    100,000 examples are split to find it; a later step may take one micro-batch more for it.
    """
    num_split = max(1, int(np.searchsorted(plan.offsets, MAX_EXAMPLES)))
    num_split = min(len(plan), num_split)
    packing = PackingSpec(max_tokens, max_seq_len)
    micro_batches = [
        ids
        for step in range(num_split)
        for rank in split_step(plan[step], lengths, world_size, packing)
        for ids in rank
    ]
    longest = int(lengths[plan.order].max())
    fullest = max(int(lengths[ids].sum()) for ids in micro_batches)
    tokens = -(-max(longest, fullest) // 64) * 64
    tokens = min(max_tokens, tokens)
    documents = max(len(ids) for ids in micro_batches)
    if num_split < len(plan):
        documents *= 2  # later steps may hold more examples
    return tokens, documents + -(-tokens // max_seq_len)  # padding is documents as well


def release_graphs(model: nn.Module) -> None:
    """Lets the decoder layers run as before. The memory of their graphs is free again."""
    cuda_graphs.release_graphs(decoder_layers(model))
    graph_pools.update()
