"""What a rank holds in memory from step to step, by component, measured tensor by tensor."""

import torch

from ..distributed.world import Ranks
from ..kernels.quantization import find_quantization
from .measure import peak_gpu_bytes


def memory_breakdown(engine, ranks: Ranks) -> dict[str, float]:
    """{"memory/COMPONENT_gib": GiB of this rank} after a step; empty components are left out.

    The components are frozen and trained weights (this rank's shards and what is gathered beside
    them), the quantisation's scales, fp32 masters, the optimizer's state and gradients. On a GPU
    the rest of the peak is one more: activations, dequantised weights, graphs, buffers. They cannot
    be told apart from outside.
    """
    optimizer = engine.optimizer
    sizes = _weight_bytes(engine.module)
    sizes["masters"] = _bytes(getattr(optimizer, "fp32_partitioned_groups_flat", []))
    inner = getattr(optimizer, "optimizer", optimizer)
    sizes["moments"] = _bytes(
        value for state in inner.state.values() for key, value in state.items() if key != "step"
    )
    sizes["gradients"] = _bytes([getattr(optimizer, "grad_partitions_flat_buffer", None)])
    if ranks.device.type == "cuda":
        rest = peak_gpu_bytes() - sum(sizes.values())
        sizes["activations_and_rest"] = max(0, rest)
    return {f"memory/{name}_gib": size / 2**30 for name, size in sizes.items() if size}


def _weight_bytes(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of frozen weights, of the quantisation's scales, and of trained weights."""
    sizes = {"frozen_weights": 0, "scales": 0, "trained_weights": 0}
    for p in module.parameters():
        # On one rank the shard may be the weight itself: storages are counted once.
        tensors = [t for t in (p.data, getattr(p, "ds_tensor", None)) if torch.is_tensor(t)]
        distinct = {t.data_ptr(): t for t in tensors}
        name = "trained_weights" if p.requires_grad else "frozen_weights"
        sizes[name] += _bytes(distinct.values())
    for submodule in module.modules():
        quantization = find_quantization(submodule)
        if quantization:
            sizes["scales"] += _bytes(quantization.state_tensors(submodule))
    return sizes


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
