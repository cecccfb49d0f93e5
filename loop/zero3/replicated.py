"""What DeepSpeed's ZeRO-3 can be spared. Its hooks cost a step more Python than the layers themselves, and a fast GPU waits for it.

Its partitions of gradients and optimizer state stay, and its reductions; its step, where weights are partitioned."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ..distributed.world import Ranks
from .hooks import cache_module_parameters


def spare(engine, whole: bool, ranks: Ranks) -> None:
    """Both of what follows; whole: whether each rank keeps all weights (`fit.choose_whole`)."""
    cache_module_parameters()
    if whole and hasattr(
        engine.optimizer, "parameter_offload"
    ):  # not a bare model, as tests/bench compares with
        replicate_weights(engine, ranks)


def replicate_weights(engine, ranks: Ranks) -> None:
    """Where every weight stays on every rank, there is nothing to fetch and to let go. Each is gathered once (on one rank it is the shard
    itself); the hooks are removed, and a step does not look at each gradient by itself."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    engine.whole = True
    for (
        module
    ) in engine.module.modules():  # not all at once: what is sent takes as much memory again
        if away := [
            p
            for p in module.parameters(recurse=False)
            if p.ds_status == ZeroParamStatus.NOT_AVAILABLE
        ]:
            away[0].all_gather_coalesced(away).wait()  # GatheredParameters would make copies
    for p in parameters:
        p.partition = lambda *args, **kwargs: None
    optimizer.parameter_offload._remove_module_hooks()
    engine.module_forward_pre_hook.remove()  # these walk through all modules, to find weights that others use
    engine.module_forward_post_hook.remove()
    optimizer.parameter_offload.partition_all_parameters = lambda: None
    optimizer.step = ReplicatedStep(optimizer, ranks.world_size)
    if (
        ranks.device.type == "cuda"
        and sum(p.numel() for group in optimizer.fp16_groups for p in group)
        <= optimizer.reduce_bucket_size
    ):
        # All gradients fit one bucket, which goes at the end of the backward pass, so there is nothing that a stream of its own could overlap. On the
        # default one the order is right by itself, and DeepSpeed need not wait on the CPU after each micro-batch: the update is launched during the
        # backward pass. 88,392 -> 89,599 tokens/s on one H200, to the bit the same.
        stream = torch.cuda.default_stream()
        stream.synchronize = lambda: None  # type: ignore[method-assign]  # of this object alone
        optimizer.reduce_and_partition_stream = stream


class ReplicatedStep:
    """ZeRO-3's step for whole weights. DeepSpeed waits for the gradient's norm before it launches anything; torch's fused AdamW reads on the GPU
    whether it shall do nothing, so that all is launched first. After a skipped step weights, moments and counters are what they were."""

    def __init__(self, optimizer, world_size: int) -> None:
        self.optimizer, self.share = optimizer, all_gather_updates(optimizer, world_size)

    def __call__(self, closure=None) -> None:
        optimizer, inner = self.optimizer, self.optimizer.optimizer
        optimizer._pre_step()
        gradients = (
            optimizer.averaged_gradients
        )  # {group: this rank's slices, fp32}; clipping was ours
        squares = torch.stack(
            [
                torch.stack(torch._foreach_norm(gradients[i])).square().sum()
                for i in sorted(gradients)
            ]
        ).sum()
        dist.all_reduce(squares)
        bad = (~squares.isfinite()).float()
        if inner.defaults["fused"]:
            inner.found_inf = bad
        update = inner.defaults["fused"] or not bad
        for group, (flat, weights) in enumerate(
            zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
        ):
            if update:
                flat.grad = torch.cat([g.flatten() for g in gradients[group]])
                optimizer._optimizer_step(group)
                weights.data.copy_(flat.data)
            flat.grad = gradients[group] = None
        self.share()  # after a skipped step, too: another rank's AdamW may be the other one
        optimizer.overflow = bool(bad)  # waits, now that there is nothing left to launch


def all_gather_updates(optimizer, world_size: int) -> Callable[[], None]:
    """What gives each rank the others' slices of the trained weights after an update: one collective for each parameter group, and the weights
    stay where they are. On one rank the slice is the weight."""
    if world_size == 1:
        return lambda: None
    places, pieces, sends = [], [], []
    for group, flat in zip(
        optimizer.fp16_groups, optimizer.fp16_partitioned_groups_flat
    ):  # of the engine's dtype, whatever their name
        everyone = flat.new_empty(world_size * flat.numel())
        sends.append((everyone, flat))
        for p in group:
            size, start = (
                p.ds_tensor.ds_numel,
                (p.ds_tensor.data_ptr() - flat.data_ptr()) // flat.element_size(),
            )
            for rank in range(world_size):
                count = min(
                    size, p.ds_numel - rank * size
                )  # the last slices may be padded, or nothing but padding
                if count > 0:
                    places.append(p.data.view(-1)[rank * size : rank * size + count])
                    pieces.append(everyone[rank * flat.numel() + start :][:count])

    def share() -> None:
        for everyone, flat in sends:
            dist.all_gather_into_tensor(everyone, flat.data)
        torch._foreach_copy_(places, pieces)

    return share
