"""The state of training as whole tensors, whatever the number of ranks: what ZeRO-3 and Adam hold in slices, and the generators.

Under ZeRO-3 each rank holds a slice of every fp32 master and of its Adam moments. A checkpoint shall fit another number of ranks, so the
slices are put together on the way out and cut anew on the way in.
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
from ..optim.adamw import trainable_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
FILE_BYTES = (
    2**28
)  # of one file, and of what rank 0 holds at a time while saving; one tensor with its moments may be more


def gather_full_state(engine, ranks: Ranks) -> Iterator[dict[str, torch.Tensor]]:
    """Masters and moments by name, whole, a file's worth at a time, on rank 0's CPU ({} on the others).

    Each turn is one collective (tensor by tensor, 300 small ones would take most of the time), and every rank must take all of them."""
    for group in file_groups(trainable_parameters(engine.module)):
        set_activity(
            "gathering the state, or writing it on rank 0"
        )  # file by file: a large one on a slow disk is not a standstill
        slices = [
            [safe_get_local_fp32_param(p), *(safe_get_local_optimizer_state(p, m) for m in MOMENTS)]
            for _, p in group
        ]
        mine = torch.cat([t.flatten() for kinds in slices for t in kinds])  # [sum of 3 * slice]
        everyone = (
            [torch.empty_like(mine) for _ in range(ranks.world_size)] if ranks.is_main else None
        )
        dist.gather(mine, everyone)
        tensors, start = {}, 0
        if everyone is not None:
            flat = torch.stack(everyone).cpu()  # [world_size, sum of 3 * slice]
            for name, p in group:
                size = p.ds_tensor.ds_numel
                for kind in KINDS:
                    tensors[f"{name}.{kind}"] = (
                        flat[:, start : start + size]
                        .reshape(-1)[: p.ds_numel]
                        .clone()
                        .view(p.ds_shape)
                    )
                    start += size
        yield tensors


def file_groups(parameters: list[tuple]) -> Iterator[list[tuple]]:
    """Cuts [(name, parameter)] into runs of at most FILE_BYTES of masters and moments, equally on all ranks."""
    group: list[tuple] = []
    used = 0
    for name, p in parameters:
        if group and used + 12 * p.ds_numel > FILE_BYTES:
            yield group
            group, used = [], 0
        group.append((name, p))
        used += 12 * p.ds_numel
    yield group


def scatter_full_tensor(p, kind: str, whole: torch.Tensor, ranks: Ranks) -> None:
    """Puts a whole tensor where ZeRO-3 has its zero-padded slices: a rank's `size` values, the next rank's, ...
    kind: "master" or one of MOMENTS. Every rank must call it, after `create_adam_state`."""
    size = p.ds_tensor.ds_numel
    flat = torch.nn.functional.pad(whole.flatten(), (0, size * ranks.world_size - whole.numel()))
    mine = flat.narrow(0, size * ranks.rank, size).to(ranks.device)
    if kind != "master":
        return safe_set_local_optimizer_state(p, mine, kind)
    safe_set_local_fp32_param(p, mine)
    with deepspeed.zero.GatheredParameters(
        [p], modifier_rank=0
    ):  # the working copy in the engine's dtype
        if ranks.is_main:
            p.data.copy_(whole)


def create_adam_state(engine, step: int) -> None:
    """Adam's state does not exist before its first step: create it on ZeRO-3's flat partitions, at the saved step."""
    adam = engine.optimizer.optimizer
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        fused = any(
            group.get("fused") for group in adam.param_groups
        )  # its step counter lives beside the data
        count = torch.tensor(float(step), device=flat.device if fused else "cpu")
        adam.state[flat] = {"step": count, **{m: torch.zeros_like(flat) for m in MOMENTS}}


def adam_step(engine) -> int:
    """How many updates Adam has made; skipped steps don't count."""
    return next(
        (int(s["step"]) for s in engine.optimizer.optimizer.state.values() if "step" in s), 0
    )
