"""Does it fit? What the run chooses by the ledger, and what would make a run fit that does not."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..config.schema import Config
from ..distributed.world import Ranks
from .estimate import EVERY_WEIGHT, LOADED, STATES, WORKING, estimate_memory, max_rows

CONTEXT = (
    2**30
)  # what CUDA, its libraries and NCCL take beside the tensors: an allowance, not measured


def working_bytes(parts: dict[str, int]) -> int:
    """Bytes of a ledger that are wanted beside the weights and the optimizer's state."""
    return sum(parts[name] for name in (*WORKING, "gradient bucket", "allocator slack"))


def choose_weight_placement(
    config: Config,
    ds: dict,
    shape,
    world_size: int,
    free_bytes: int | None,
    fused: bool,
    supervised: float = 1 / 3,
) -> tuple[dict, bool]:
    """(DeepSpeed's configuration, whether each rank keeps all weights). One rank does, unless they lie on the CPU or a disk. On several, ZeRO-3
    then partitions gradients, masters and moments, and its persistence thresholds are above all weights. `auto`: where that fits, and nothing has
    to be recomputed that need not be otherwise. free_bytes: as in `choose_micro_batch`; None: a CPU, no."""
    zero = ds["zero_optimization"]
    if zero.get("offload_param", {}).get("device", "none") != "none":
        return ds, False
    if world_size == 1:
        return ds, True
    whole = ds | {
        "zero_optimization": zero
        | dict.fromkeys(
            ["stage3_param_persistence_threshold", "stage3_model_persistence_threshold"],
            EVERY_WEIGHT,
        )
    }
    wanted = config.replicate_weights
    if wanted == "auto" and free_bytes is not None:
        dense = fused and config.cache_dequantized_weights is True
        free_bytes -= (
            dense
            * estimate_memory(shape, config, ds, world_size, 1, True, fused, True, supervised)[
                "dequantised copies"
            ]
        )
        rest = fused, dense, supervised
        rows, checkpointing = choose_micro_batch(
            config, whole, shape, world_size, free_bytes, *rest, config.cuda_graphs
        )
        parts = estimate_memory(
            shape,
            config,
            whole,
            world_size,
            rows,
            checkpointing,
            *rest,
            config.cuda_graphs and not checkpointing,
        )
        otherwise = choose_micro_batch(config, ds, shape, world_size, free_bytes, *rest)[1]
        wanted = working_bytes(parts) <= free_bytes and checkpointing <= otherwise
    return (whole, True) if wanted is True else (ds, False)


def choose_micro_batch(
    config: Config,
    ds: dict,
    shape,
    world_size: int,
    free_bytes: int | None,
    fused: bool,
    dequantized: bool,
    supervised: float = 1 / 3,
    replayed: bool = False,
) -> tuple[int, bool]:
    """(micro_batch_size in rows, checkpointing). `auto` takes the fewest micro-batches that fit the free memory, and recomputes activations only
    where even one row does not fit without. free_bytes: beside the weights and the optimizer's state; None: a CPU, no checkpointing, all
    rows at once. replayed: whether layers that don't recompute are recorded. The others are as in `ledger`."""
    sizes = (
        range(max_rows(config, world_size), 0, -1)
        if config.micro_batch_size == "auto"
        else [config.micro_batch_size]
    )
    for checkpointing in (
        [False, True]
        if config.gradient_checkpointing == "auto"
        else [config.gradient_checkpointing]
    ):
        for size in sizes:
            if free_bytes is None:
                return size, checkpointing
            parts = estimate_memory(
                shape,
                config,
                ds,
                world_size,
                size,
                checkpointing,
                fused,
                dequantized,
                supervised,
                replayed and not checkpointing,
            )
            if working_bytes(parts) <= free_bytes:
                return size, checkpointing
    return sizes[-1], config.gradient_checkpointing is not False


@dataclass(frozen=True)
class MemoryPlan:
    """What a run would choose on GPUs of this memory (in bytes, None: unknown), and its ledger."""

    rows: int
    checkpointing: bool
    dequantized: bool
    whole: bool  # on several GPUs, all weights on each
    parts: dict[str, int]
    memory: int | None

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + CONTEXT

    @property
    def fits(self) -> bool:
        return self.memory is None or self.total <= self.memory


def plan_memory(
    config: Config, ds: dict, shape, gpus: int, memory: int | None, supervised: float = 1 / 3
) -> MemoryPlan:
    """Goes by the run's own rules for `auto`. memory: of one GPU, in bytes; unknown, all that makes a step fast is taken."""
    fused, free = bool(config.fused_layers), None
    loaded = estimate_memory(shape, config, ds, gpus, 1, True, fused, False, supervised)
    if memory is not None:
        free = (
            memory
            - CONTEXT
            - sum(loaded[name] for name in (*LOADED, *STATES) if name != "gradient bucket")
        )
    ds, whole = choose_weight_placement(
        config, ds, shape, gpus, EVERY_WEIGHT if free is None else free, fused, supervised
    )
    dense = estimate_memory(shape, config, ds, gpus, 1, True, fused, True, supervised)[
        "dequantised copies"
    ]
    replayed = config.cuda_graphs and whole
    wanted = (
        config.cache_dequantized_weights
        if config.cache_dequantized_weights != "auto"
        else not replayed and (free is None or dense <= 0.1 * free)
    )
    dequantized = bool(wanted and fused and dense)
    if free is not None:
        free -= dense * dequantized
    rows, checkpointing = choose_micro_batch(
        config, ds, shape, gpus, free, fused, dequantized, supervised, replayed
    )
    parts = estimate_memory(
        shape,
        config,
        ds,
        gpus,
        rows,
        checkpointing,
        fused,
        dequantized,
        supervised,
        replayed and not checkpointing,
    )
    return MemoryPlan(rows, checkpointing, dequantized, whole and gpus > 1, parts, memory)


def free_gpu_bytes(num_trained: int, ranks: Ranks) -> int | None:
    """Memory for activations on the fullest GPU of the run, None on CPUs. What the engine will add is taken off: 18 bytes for every
    trainable weight (its fp32 master, gradient and two moments, and a gradient in bf16), shared by all ranks."""
    if ranks.device.type == "cpu":
        return None
    states = 18 * num_trained // ranks.world_size
    free = torch.tensor(torch.cuda.mem_get_info()[0] - states, device=ranks.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)  # all ranks must come to the same cut
    return int(free)
