"""What DeepSpeed's ZeRO-3 can be spared. Its hooks cost a step more Python than the layers themselves, and a fast GPU waits for it.

Everything else of ZeRO-3 stays: its partitions of weights, gradients and optimizer state, its reductions, its step."""

import weakref

import torch
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from .distributed import Ranks


def spare(engine, ds: dict, ranks: Ranks) -> bool:
    """Both of what follows; whether the engine's weights stay whole."""
    remember_parameters()
    return keep_whole(engine, ds, ranks)


def remember_parameters() -> None:
    """Each hook of a layer asks for the layer's parameters, by a walk through its modules: a quarter of all Python of a step. They stay the
    same after `deepspeed.initialize`, so each module is walked once."""
    plain = partitioned_param_coordinator.iter_params
    known: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()
    if hasattr(plain, "plain"):
        return

    def iter_params(module: torch.nn.Module, recurse: bool = False) -> list[torch.nn.Parameter]:
        found, external = known.setdefault(module, {}), len(module.ds_external_parameters())  # type: ignore[operator]  # DeepSpeed's method
        if recurse not in found or external != found[recurse][0]:
            found[recurse] = external, list(plain(module, recurse))
        return found[recurse][1]

    iter_params.plain = plain  # type: ignore[attr-defined]  # a mark; mypy has no attributes of functions
    partitioned_param_coordinator.iter_params = parameter_offload.iter_params = iter_params


def keep_whole(engine, ds: dict, ranks: Ranks) -> bool:
    """On one rank there is nothing to take away, to fetch or to send. Every weight is taken up once, as the shard itself, and stays; the
    hooks that would fetch it and let it go are removed, and a step does not look at each gradient by itself. Returns whether that is so: on
    several ranks, and with weights on the CPU or a disk (offload_param), all stays as it is."""
    optimizer, offload = engine.optimizer, ds["zero_optimization"].get("offload_param", {}).get("device", "none")
    if ranks.world_size > 1 or offload != "none":
        return False
    if not hasattr(optimizer, "parameter_offload"):  # a bare model, for comparison (tests/bench)
        return True
    engine.whole, parameters = True, list(engine.module.parameters())
    if away := [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]:
        away[0].all_gather_coalesced(away).wait()  # GatheredParameters would make copies
    for p in parameters:
        p.partition = lambda *args, **kwargs: None
    optimizer.parameter_offload._remove_module_hooks()
    engine.module_forward_pre_hook.remove()  # these walk through all modules, to find weights that others use
    engine.module_forward_post_hook.remove()
    optimizer.parameter_offload.partition_all_parameters = lambda: None

    def norms() -> list[torch.Tensor]:
        """Of each parameter group's gradients. The step is skipped where one is not finite; clipping is ours."""
        groups = optimizer.averaged_gradients  # {group: gradients, fp32}
        return [torch.stack(torch._foreach_norm(groups[i])).norm() for i in sorted(groups)]

    def hand_over(group: int) -> None:
        """The gradients to the optimizer, which has them in one piece."""
        optimizer.fp32_partitioned_groups_flat[group].grad = torch.cat([g.flatten() for g in optimizer.averaged_gradients[group]])
        optimizer.averaged_gradients[group] = None

    optimizer._get_norm_groups, optimizer._prepare_fp32_grad_for_sub_group = norms, hand_over
    return True
