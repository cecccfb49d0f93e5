"""Does it fit? The rules by which a run chooses its `auto` settings from the memory estimate.

`plan_memory` applies the same rules to GPUs of a given memory, for `./launch.sh plan`.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ..config.schema import Config
from ..distributed.world import Ranks
from .estimate import (
    EVERY_WEIGHT,
    LOADED,
    STATES,
    WORKING,
    RunShape,
    count_weights,
    dequantized_bytes,
    estimate_memory,
    max_rows,
    offloads_parameters,
)

# What CUDA, its libraries and NCCL take beside the tensors: an allowance, not measured.
CONTEXT = 2**30


def working_bytes(parts: dict[str, int]) -> int:
    """Bytes of an estimate that a step needs beside the weights and the optimizer's state."""
    return sum(parts[name] for name in (*WORKING, "gradient bucket", "allocator slack"))


def with_replicated_weights(ds_config: dict) -> dict:
    """DeepSpeed's configuration with persistence thresholds above all weights.

    ZeRO-3 then partitions gradients, masters and moments, and every rank holds all weights.
    """
    thresholds = {
        "stage3_param_persistence_threshold": EVERY_WEIGHT,
        "stage3_model_persistence_threshold": EVERY_WEIGHT,
    }
    return ds_config | {"zero_optimization": ds_config["zero_optimization"] | thresholds}


def choose_weight_placement(
    config: Config, ds_config: dict, model_config, run: RunShape, free_bytes: int | None
) -> tuple[dict, bool]:
    """(DeepSpeed's configuration, whether each rank holds all weights).

    One rank holds them, unless they lie on the CPU or a disk. On several ranks `auto` replicates
    them where that fits and does not need checkpointing that sharded weights would not need.

    Args:
        run: ranks, kernels and logits; the rest is not read, as it is not chosen yet.
        free_bytes: as in `choose_micro_batch`; with None, a CPU, `auto` means no.
    """
    if offloads_parameters(ds_config):
        return ds_config, False
    if run.world_size == 1:
        return ds_config, True
    replicate = config.replicate_weights
    if replicate == "auto":
        replicate = free_bytes is not None and _replication_fits(
            config, ds_config, model_config, run, free_bytes
        )
    if replicate:
        return with_replicated_weights(ds_config), True
    return ds_config, False


def _replication_fits(
    config: Config, ds_config: dict, model_config, run: RunShape, free_bytes: int
) -> bool:
    """Whether all weights fit each rank, and need no checkpointing that shards would not need."""
    dequantized = run.fused and config.cache_dequantized_weights is True
    if dequantized:
        counts = count_weights(config, model_config)
        free_bytes -= dequantized_bytes(config, ds_config, counts)
    sharded = replace(run, dequantized=dequantized, cuda_graphs=False)
    replicated = replace(sharded, cuda_graphs=config.cuda_graphs)
    replicated_config = with_replicated_weights(ds_config)
    rows, checkpointing = choose_micro_batch(
        config, replicated_config, model_config, replicated, free_bytes
    )
    parts = estimate_memory(
        config, replicated_config, model_config, replicated, rows, checkpointing
    )
    if working_bytes(parts) > free_bytes:
        return False
    _, sharded_needs_checkpointing = choose_micro_batch(
        config, ds_config, model_config, sharded, free_bytes
    )
    return sharded_needs_checkpointing or not checkpointing


def choose_micro_batch(
    config: Config, ds_config: dict, model_config, run: RunShape, free_bytes: int | None
) -> tuple[int, bool]:
    """(micro_batch_size in rows, whether activations are recomputed).

    `auto` takes the fewest micro-batches that fit the free memory. It recomputes activations only
    where not even one row fits without.

    Args:
        free_bytes: beside the weights and the optimizer's state. None: a CPU, which takes all rows
            at once without checkpointing.
    """
    if config.micro_batch_size == "auto":
        sizes = list(range(max_rows(config, run.world_size), 0, -1))
    else:
        sizes = [config.micro_batch_size]
    if config.gradient_checkpointing == "auto":
        choices = [False, True]
    else:
        choices = [config.gradient_checkpointing]
    for checkpointing in choices:
        for rows in sizes:
            if free_bytes is None:
                return rows, checkpointing
            parts = estimate_memory(config, ds_config, model_config, run, rows, checkpointing)
            if working_bytes(parts) <= free_bytes:
                return rows, checkpointing
    return sizes[-1], choices[-1]  # it does not fit; this comes nearest


def choose_fp8_codes(
    config: Config, ds_config: dict, model_config, run: RunShape, free_bytes: int | None
) -> bool:
    """Whether the FP8 codes of frozen weights are kept, with compute=fp8.

    With "auto" they are where neither more micro-batches nor checkpointing are needed for it. The
    arguments are those of `choose_micro_batch`, free_bytes without the codes.
    """
    if config.cache_dequantized_weights != "auto":
        return config.cache_dequantized_weights
    if free_bytes is None:
        return True
    kept = replace(run, dequantized=True)
    made_again = replace(run, dequantized=False)
    left = free_bytes - dequantized_bytes(config, ds_config, count_weights(config, model_config))
    choice = choose_micro_batch(config, ds_config, model_config, kept, left)
    parts = estimate_memory(config, ds_config, model_config, kept, *choice)
    return working_bytes(parts) <= left and choice == choose_micro_batch(
        config, ds_config, model_config, made_again, free_bytes
    )


@dataclass(frozen=True)
class MemoryPlan:
    """What a run would choose on GPUs of this memory, and its memory estimate."""

    rows: int  # of a micro-batch
    checkpointing: bool
    dequantized: bool
    replicated: bool  # several GPUs, each of which holds all weights
    parts: dict[str, int]  # as `estimate_memory` returns them
    memory: int | None  # bytes of one GPU; None: unknown

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.parts.values()) + CONTEXT

    @property
    def fits(self) -> bool:
        return self.memory is None or self.total <= self.memory


def plan_memory(
    config: Config,
    ds_config: dict,
    model_config,
    gpus: int,
    memory: int | None,
    supervised_fraction: float = 1 / 3,
) -> MemoryPlan:
    """What a run would choose on `gpus` GPUs, by the run's own rules for `auto`.

    Args:
        memory: of one GPU, in bytes. None: unknown; then all that makes a step fast is taken.
        supervised_fraction: of the tokens, which have logits.
    """
    run = RunShape(gpus, bool(config.fused_layers), supervised_fraction)
    free = None
    if memory is not None:
        loaded = estimate_memory(config, ds_config, model_config, run, 1, True)
        resident = [name for name in (*LOADED, *STATES) if name != "gradient bucket"]
        free = memory - CONTEXT - sum(loaded[name] for name in resident)
    ds_config, replicated = choose_weight_placement(
        config, ds_config, model_config, run, EVERY_WEIGHT if free is None else free
    )
    cuda_graphs = config.cuda_graphs and replicated

    counts = count_weights(config, model_config)
    copies = dequantized_bytes(config, ds_config, counts) if run.fused else 0
    run = replace(run, cuda_graphs=cuda_graphs)
    dequantized = config.cache_dequantized_weights
    if config.compute == "fp8":
        dequantized = choose_fp8_codes(config, ds_config, model_config, run, free)
    elif dequantized == "auto":
        dequantized = not cuda_graphs and (free is None or copies <= 0.1 * free)
    dequantized = bool(dequantized and copies)
    if dequantized and free is not None:
        free -= copies

    run = replace(run, dequantized=dequantized)
    rows, checkpointing = choose_micro_batch(config, ds_config, model_config, run, free)
    parts = estimate_memory(config, ds_config, model_config, run, rows, checkpointing)
    return MemoryPlan(
        rows, checkpointing, dequantized, replicated and gpus > 1, parts=parts, memory=memory
    )


def free_gpu_bytes(num_trained: int, optimizer_bytes_per_weight: int, ranks: Ranks) -> int | None:
    """Memory for activations on the fullest GPU of the run; None on CPUs. Every rank must call it.

    What the engine will add is subtracted, each rank's shard of it: for every trained weight the
    optimizer's state, an fp32 master and gradient, and a bf16 gradient.
    """
    if ranks.device.type == "cpu":
        return None
    per_weight = optimizer_bytes_per_weight + 4 + 4 + 2
    states = per_weight * num_trained // ranks.world_size
    free = torch.tensor(torch.cuda.mem_get_info()[0] - states, device=ranks.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)  # all ranks must choose the same
    return int(free)
