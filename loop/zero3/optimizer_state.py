"""The trained weights and their optimizer state as full tensors, whatever the number of ranks.

Under ZeRO-3 each rank holds a slice of every fp32 master and of its optimizer state. A checkpoint
must fit another number of ranks, so the slices are gathered when it is saved, and full tensors are
scattered when it is restored.
"""

from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..optim.adamw import spec_of, trainable_parameters

MASTER = "master"  # the kind of the fp32 weights; the other kinds are the optimizer's state keys
# Of one file, and of what rank 0 holds at a time while saving. A single tensor with its state may
# be larger.
FILE_BYTES = 2**28


def tensor_kinds(engine) -> tuple[str, ...]:
    """What is saved of every trained weight: its fp32 master and its optimizer state."""
    return (MASTER, *spec_of(engine.optimizer.optimizer).state_keys)


def gather_full_state(engine, ranks: Ranks) -> Iterator[dict[str, torch.Tensor]]:
    """The full tensors by "NAME.KIND", a file's worth at a time, on rank 0's CPU; {} elsewhere.

    Each turn is one collective, as tensor by tensor 300 small ones would take most of the time.
    Every rank must take all turns.
    """
    kinds = tensor_kinds(engine)
    for group in file_groups(trainable_parameters(engine.module), len(kinds)):
        # For each file: a large one on a slow disk is not a stall.
        set_activity("gathering the state, or writing it on rank 0")
        slices = [local_slice(p, kind).flatten() for _, p in group for kind in kinds]
        mine = torch.cat(slices)  # [kinds * sum of slices]
        everyone = None
        if ranks.is_main:
            everyone = [torch.empty_like(mine) for _ in range(ranks.world_size)]
        dist.gather(mine, everyone)
        if everyone is None:
            yield {}
        else:
            yield full_tensors(torch.stack(everyone).cpu(), group, kinds)


def local_slice(p, kind: str) -> torch.Tensor:
    """This rank's slice of one kind of a trained weight, fp32."""
    if kind == MASTER:
        return safe_get_local_fp32_param(p)
    return safe_get_local_optimizer_state(p, kind)


def full_tensors(
    slices: torch.Tensor, parameters: list[tuple], kinds: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Puts slices together.

    slices: [world_size, kinds * sum of slices], each parameter's kinds one behind the other.
    """
    tensors = {}
    start = 0  # of a parameter's slice
    for name, p in parameters:
        size = p.ds_tensor.ds_numel
        for kind in kinds:
            padded = slices[:, start : start + size].reshape(-1)
            tensors[f"{name}.{kind}"] = padded[: p.ds_numel].clone().view(p.ds_shape)
            start += size
    return tensors


def file_groups(parameters: list[tuple], num_kinds: int) -> Iterator[list[tuple]]:
    """Splits [(name, parameter)] into files of at most FILE_BYTES, equally on all ranks.

    num_kinds: fp32 tensors that are saved of each parameter.
    """
    group: list[tuple] = []
    used = 0
    for name, p in parameters:
        size = 4 * num_kinds * p.ds_numel
        if group and used + size > FILE_BYTES:
            yield group
            group = []
            used = 0
        group.append((name, p))
        used += size
    yield group


def scatter_full_tensor(p, kind: str, full: torch.Tensor, ranks: Ranks) -> None:
    """Puts a full tensor where ZeRO-3 has its zero-padded slices, one behind the other by rank.

    kind: of `tensor_kinds`. Every rank must call it, after `create_adam_state`.
    """
    size = p.ds_tensor.ds_numel
    padded = torch.nn.functional.pad(full.flatten(), (0, size * ranks.world_size - full.numel()))
    mine = padded.narrow(0, size * ranks.rank, size).to(ranks.device)
    if kind != MASTER:
        safe_set_local_optimizer_state(p, mine, kind)
        return
    safe_set_local_fp32_param(p, mine)
    # The working copy, in the engine's dtype.
    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        if ranks.is_main:
            p.data.copy_(full)


def create_adam_state(engine, step: int) -> None:
    """Creates the optimizer's state, all zeros, on ZeRO-3's flat slices.

    It does not exist before the first update. step: the number of updates that it shall count.
    """
    inner = engine.optimizer.optimizer
    fused = any(group.get("fused") for group in inner.param_groups)
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        # The fused kernel has its counter beside the data, the others on the CPU.
        count = torch.tensor(float(step), device=flat.device if fused else "cpu")
        zeros = {key: torch.zeros_like(flat) for key in spec_of(inner).state_keys}
        inner.state[flat] = {"step": count, **zeros}


def adam_step(engine) -> int:
    """How many updates the optimizer has made; skipped steps don't count."""
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0
