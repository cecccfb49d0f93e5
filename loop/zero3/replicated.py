"""ZeRO-3 for weights that every rank holds in full: nothing is fetched and released in a step.

DeepSpeed has no such mode. Its persistence thresholds keep the weights in place, but its hooks
still run, cost more Python than the layers themselves, and a fast GPU waits for it. What stays are
ZeRO-3's shards of gradients and optimizer state, and its reductions.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ..distributed.world import Ranks


def replicate_weights(engine, ranks: Ranks) -> "ReplicatedWeights | None":
    """Gathers all weights of a ZeRO-3 engine for good. Every rank must call it.

    Returns the patches, which can be undone; None for a bare model, as tests/bench compares with.
    """
    if not hasattr(engine.optimizer, "parameter_offload"):
        return None
    return ReplicatedWeights(engine, ranks)


def is_replicated(engine) -> bool:
    """Whether an engine's weights were replicated by `replicate_weights`."""
    optimizer = getattr(engine, "optimizer", None)
    return isinstance(getattr(optimizer, "step", None), ReplicatedStep)


class ReplicatedWeights:
    """The patches of an engine (DeepSpeed 0.19.8) whose weights stay on every rank.

    Overwritten or removed, by the method that does it:

    - `_gather`: nothing; each weight is gathered once. On one rank it is the shard itself.
    - `_stop_releasing`: `partition` of each parameter and `partition_all_parameters` of ZeRO-3's
      parameter offload, which would release the weights again.
    - `_remove_hooks`: ZeRO-3's hooks of all modules, which fetch and release; the engine's two
      hooks of the model, which walk through all modules to find weights that others use.
    - `_replace_step`: `step` of ZeRO-3's optimizer, see `ReplicatedStep`.
    - `_use_default_stream`: the stream of reductions, on GPUs.

    `restore()` puts everything back.
    """

    def __init__(self, engine, ranks: Ranks) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.offload = engine.optimizer.parameter_offload
        self._undo = contextlib.ExitStack()
        self._gather()
        self._stop_releasing()
        self._remove_hooks()
        self._replace_step(ranks)
        if ranks.device.type == "cuda":
            self._use_default_stream()

    def restore(self) -> None:
        """Gives the engine back to ZeRO-3: shards, hooks and step as DeepSpeed made them."""
        self._undo.close()  # the last patch first

    def _override(self, owner, name: str, value) -> None:
        """Sets `owner.name`, of this object alone, until `restore`."""
        if name in vars(owner):
            self._undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            self._undo.callback(delattr, owner, name)
        setattr(owner, name, value)

    def _gather(self) -> None:
        gathered = []
        for module in self.engine.module.modules():
            # Module by module: the buffer of a collective takes as much memory as the weights.
            parameters = module.parameters(recurse=False)
            sharded = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            if sharded:
                # GatheredParameters would make copies.
                sharded[0].all_gather_coalesced(sharded).wait()
                gathered += sharded
        self._undo.callback(_release, gathered)

    def _stop_releasing(self) -> None:
        for p in self.engine.module.parameters():
            self._override(p, "partition", lambda *args, **kwargs: None)
        self._override(self.offload, "partition_all_parameters", lambda: None)

    def _remove_hooks(self) -> None:
        # Undone in reverse: the engine's hooks come first again, as DeepSpeed registers them.
        self.offload._remove_module_hooks()
        self._undo.callback(self._restore_zero3_hooks)
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        self._undo.callback(self._restore_engine_hooks)

    def _restore_zero3_hooks(self) -> None:
        self.offload.forward_hooks = []
        self.offload.backward_hooks = []
        self.offload.setup_zero_stage3_hooks()

    def _restore_engine_hooks(self) -> None:
        engine = self.engine
        engine.module_forward_pre_hook = engine._create_module_forward_pre_hook()
        engine.module_forward_post_hook = engine._create_module_forward_post_hook()

    def _replace_step(self, ranks: Ranks) -> None:
        inner = self.optimizer.optimizer
        self._undo.callback(lambda: vars(inner).pop("found_inf", None))  # of `ReplicatedStep`
        self._override(self.optimizer, "step", ReplicatedStep(self.optimizer, ranks.world_size))

    def _use_default_stream(self) -> None:
        """Puts reductions on the default stream where all gradients fit one bucket.

        The bucket is reduced at the end of the backward pass, so a stream of its own has nothing to
        overlap with. On the default stream the order is right by itself. DeepSpeed then need not
        wait on the CPU after each micro-batch, and the update is launched during the backward pass:
        88,392 -> 89,599 tokens/s on one H200, to the bit the same.
        """
        numel = sum(p.numel() for group in self.optimizer.fp16_groups for p in group)
        if numel > self.optimizer.reduce_bucket_size:
            return
        stream = torch.cuda.default_stream()
        self._override(stream, "synchronize", lambda: None)
        self._override(self.optimizer, "reduce_and_partition_stream", stream)


def _release(parameters: list) -> None:
    """Leaves each rank with its shards. The parameters' own `partition` must be back."""
    for p in parameters:
        p.partition()


class ReplicatedStep:
    """The step of ZeRO-3's optimizer, for weights that every rank holds in full.

    DeepSpeed waits for the gradient's norm before it launches anything. torch's fused optimizers
    read on the GPU whether to do nothing, so here everything is launched first. After a skipped
    step weights, optimizer state and counters are what they were.
    """

    def __init__(self, optimizer, world_size: int) -> None:
        self.optimizer = optimizer
        self.all_gather_updates = prepare_all_gather(optimizer, world_size)

    def __call__(self, closure=None) -> None:
        optimizer = self.optimizer
        inner = self.optimizer.optimizer
        optimizer._pre_step()
        gradients = optimizer.averaged_gradients  # {group: this rank's slices, fp32}, clipped
        nonfinite = has_nonfinite(gradients)
        fused = inner.defaults.get("fused")
        if fused:
            inner.found_inf = nonfinite
        update = fused or not nonfinite  # only a fused optimizer decides without a wait
        masters = optimizer.fp32_partitioned_groups_flat
        shards = optimizer.fp16_partitioned_groups_flat  # of the engine's dtype, despite the name
        for group, (master, shard) in enumerate(zip(masters, shards)):
            if update:
                master.grad = torch.cat([g.flatten() for g in gradients[group]])
                optimizer._optimizer_step(group)
                shard.data.copy_(master.data)
            master.grad = None
            gradients[group] = None
        # After a skipped step, too: another rank may have another implementation of the optimizer.
        self.all_gather_updates()
        optimizer.overflow = bool(nonfinite)  # waits, now that nothing is left to launch


def has_nonfinite(gradients: dict[int, list[torch.Tensor]]) -> torch.Tensor:
    """1.0 on every rank where a gradient of any rank is NaN or inf, else 0.0; on the device."""
    groups = [torch.stack(torch._foreach_norm(gradients[i])) for i in sorted(gradients)]
    squares = torch.stack([norms.square().sum() for norms in groups]).sum()
    dist.all_reduce(squares)
    return (~squares.isfinite()).float()


def prepare_all_gather(optimizer, world_size: int) -> Callable[[], None]:
    """A function that gives each rank the other ranks' shards of the trained weights.

    It makes one collective for each parameter group, and the weights stay where they are. On one
    rank the shard is the weight, and the function does nothing.
    """
    if world_size == 1:
        return lambda: None
    weights = []
    updates = []
    buffers = []
    groups = zip(optimizer.fp16_groups, optimizer.fp16_partitioned_groups_flat)
    for parameters, shard in groups:  # shard: this rank's, of all parameters of the group
        buffer = shard.new_empty(world_size * shard.numel())
        buffers.append((buffer, shard))
        for p in parameters:
            size = p.ds_tensor.ds_numel  # of a rank's part of this parameter
            start = (p.ds_tensor.data_ptr() - shard.data_ptr()) // shard.element_size()
            for rank in range(world_size):
                # The last parts may be padded, or nothing but padding.
                count = min(size, p.ds_numel - rank * size)
                if count > 0:
                    weights.append(p.data.view(-1)[rank * size : rank * size + count])
                    updates.append(buffer[rank * shard.numel() + start :][:count])

    def all_gather_updates() -> None:
        for buffer, shard in buffers:
            dist.all_gather_into_tensor(buffer, shard.data)
        torch._foreach_copy_(weights, updates)

    return all_gather_updates
