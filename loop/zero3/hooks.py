"""What ZeRO-3's hooks cost, and how to be without them. Patches are of DeepSpeed 0.19.8."""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation


def cache_module_parameters() -> None:
    """Replaces DeepSpeed's `iter_params`, for the process: each module is walked only once.

    Each hook of a layer asks for the layer's parameters, by a walk through its modules. That was a
    quarter of all Python of a step. The parameters stay the same after `deepspeed.initialize`,
    except external ones, whose number is compared. `restore_module_parameters` undoes it.
    """
    original = partitioned_param_coordinator.iter_params
    if hasattr(original, "original"):
        return  # it is the cache already
    cache: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()

    def iter_params(module: torch.nn.Module, recurse: bool = False) -> list[torch.nn.Parameter]:
        found = cache.setdefault(module, {})
        external = len(module.ds_external_parameters())  # type: ignore[operator]  # DeepSpeed's
        if recurse not in found or external != found[recurse][0]:
            found[recurse] = external, list(original(module, recurse))
        return found[recurse][1]

    iter_params.original = original  # type: ignore[attr-defined]  # mypy: of a function
    _set_iter_params(iter_params)


def restore_module_parameters() -> None:
    """Undoes `cache_module_parameters`."""
    current = partitioned_param_coordinator.iter_params
    _set_iter_params(getattr(current, "original", current))


def _set_iter_params(iter_params) -> None:
    """In both modules that call it by this name."""
    partitioned_param_coordinator.iter_params = iter_params
    parameter_offload.iter_params = iter_params


@contextlib.contextmanager
def without_zero3_hooks(engine) -> Iterator[None]:
    """All weights on every rank, and no hooks of ZeRO-3's. Every rank must enter it.

    The hooks would gather again, layer by layer and in lockstep. They come back at the end.
    """
    with unwrap_model_for_generation(engine):
        yield
