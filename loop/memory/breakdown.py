"""What a rank holds in memory from step to step, by component, counted tensor by tensor."""

import torch

from ..distributed.world import Ranks
from ..kernels.quantization import find_quantization
from .measure import peak_gpu_bytes


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def memory_breakdown(engine, ranks: Ranks) -> dict[str, float]:
    """GiB of this rank after a step: frozen and trained weights (this rank's slices, and what is whole beside them), the quantisation's scales,
    fp32 masters, Adam's moments and gradients; on a GPU also what is left of the highest use: activations, dequantised weights, graphs,
    buffers. These can't be told apart from outside, so they are one figure."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    weights: dict[bool, int] = {False: 0, True: 0}
    scales = 0
    for p in parameters:
        held = {
            t.data_ptr(): t
            for t in (p.data, getattr(p, "ds_tensor", None))
            if isinstance(t, torch.Tensor)
        }
        weights[p.requires_grad] += _bytes(held.values())
    for module in engine.module.modules():
        if quantization := find_quantization(module):
            scales += _bytes(quantization.state_tensors(module))
    masters = _bytes(getattr(optimizer, "fp32_partitioned_groups_flat", []))
    adam = getattr(optimizer, "optimizer", optimizer)
    moments = _bytes(
        t for state in adam.state.values() for name, t in state.items() if name != "step"
    )
    gradients = _bytes([getattr(optimizer, "grad_partitions_flat_buffer", None)])
    known = {
        "frozen_weights": weights[False],
        "scales": scales,
        "trained_weights": weights[True],
        "masters": masters,
        "moments": moments,
        "gradients": gradients,
    }
    if ranks.device.type == "cuda":
        known["activations_and_rest"] = max(0, peak_gpu_bytes() - sum(known.values()))
    return {f"memory/{name}_gib": size / 2**30 for name, size in known.items() if size}
