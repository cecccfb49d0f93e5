"""What DeepSpeed's ZeRO-3 can be spared. Its hooks cost a step more Python than the layers themselves, and a fast GPU waits for it.

Its partitions of gradients and optimizer state stay, and its reductions; its step, where weights are partitioned."""

import weakref

import torch
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator


def cache_module_parameters() -> None:
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
