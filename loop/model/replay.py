"""Decoder layers as CUDA graphs: what Python launches kernel by kernel is recorded once and then replayed by one call a layer and direction.

A step of TinyLlama launches some 4,000 short kernels, and a fast GPU waits for Python. A graph has fixed addresses: so it is for a run whose
ranks keep their weights whole and in their places (`spare.replicate_weights`), and for rows of one size, for which `collate.pad` fills a
row with documents that nothing is learnt from. Whatever else comes along (an evaluation, a generation) runs as it did.
"""

import numpy as np
import torch.nn as nn

from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec, split_step
from ..distributed.world import Ranks
from ..kernels import cuda_graphs
from ..kernels.cuda_graphs import graph_layers
from ..kernels.dropout import DropoutMasks
from ..memory.measure import count_graphs
from .structure import decoder_layers


def can_replay(config: Config, whole: bool, ranks: Ranks, backend: str) -> bool:
    """Whether layers that don't recompute their activations will be replayed: on GPUs whose ranks keep their weights whole, with attention that does
    not ask the GPU for the documents' bounds. All ranks must call it, and get the same answer: steps are cut by it."""
    return not ranks.any(
        not (config.cuda_graphs and whole and ranks.device.type == "cuda" and backend != "sdpa")
    )


def replay_layers(
    config: Config,
    model: nn.Module,
    plan: BatchPlan,
    lengths: np.ndarray,
    capacity: int,
    dropout: DropoutMasks,
    ranks: Ranks,
) -> tuple[int, tuple[int, int] | None, str]:
    """Lets the layers of an engine's model be replayed. Returns (the capacity to cut steps for, equal on all ranks; the room that each row has to be
    filled up to, None where nothing is replayed; what a person should know)."""
    room = padded_shape_of(plan, lengths, ranks.world_size, capacity, config.max_seq_len)
    dropout.reserve(room[0])
    if in_the_way := graph_layers(
        model, decoder_layers(model), room, config.max_seq_len, ranks.device
    ):
        return (
            room[0],
            None,
            f"layers      launched kernel by kernel, not replayed: {in_the_way} (rank {ranks.rank})",
        )
    count_graphs()
    return room[0], room, ""


def padded_shape_of(
    plan: BatchPlan, lengths: np.ndarray, world_size: int, capacity: int, max_seq_len: int
) -> tuple[int, int]:
    """(tokens, documents) of a row that holds the micro-batches of the plan, and what fills it up. On several ranks that is less than the
    capacity, as steps are cut evenly. Looks at the first 100,000 examples, for a second; a later step may take a micro-batch more for it."""
    looked_at = max(1, int(np.searchsorted(plan.offsets, 100_000)))
    steps = range(min(len(plan), looked_at))
    parts = [
        part
        for step in steps
        for rank in split_step(plan[step], lengths, world_size, PackingSpec(capacity, max_seq_len))
        for part in rank
    ]
    tokens = max(int(lengths[plan.order].max()), *(int(lengths[part].sum()) for part in parts))
    tokens = min(capacity, -(-tokens // 64) * 64)
    documents = max(map(len, parts)) * (1 if len(steps) == len(plan) else 2)
    return tokens, documents + -(-tokens // max_seq_len)


def release_graphs(model: nn.Module) -> None:
    """Lets the decoder layers run as they did. Their activations' memory, kept between replays, is free again."""
    cuda_graphs.release_graphs(decoder_layers(model))
    count_graphs()
