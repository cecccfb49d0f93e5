"""Whether decoder layers are fused, and the installation of the fused parts in a model.

`install_fused_parts` runs each part against the one that it replaces, and leaves alone what
computes something else. The parts themselves are in fused_layers.py.
"""

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear

from ..config.schema import Config, ConfigError
from ..distributed.world import Ranks
from . import check_results
from .fused_layers import FusedFeedForward, FusedLinears, FusedRotary, LoraLinear, SharedForward
from .lora_ops import FUSED_OPS
from .patches import is_rotary_patched, patch_rotary
from .quantization import QUANTIZATIONS, find_quantization
from .self_test import find_failing_kernel

# ---- the choices


def choose_fused_layers(config: Config, dtype: torch.dtype, ranks: Ranks) -> tuple[bool, str]:
    """Returns (whether layers are fused, a note for the user or "").

    It is `config.fused_layers`, except that "auto" does not take kernels that failed
    `./launch.sh check` or fail here. Every rank must call it, and all get the same answer.
    Raises ConfigError, on all ranks, when the kernels are asked for and fail.
    """
    if not config.fused_layers:
        return False, ""
    problems = ranks.all_gather_json(kernel_problem(config, dtype, ranks.device))
    problem = next(filter(None, problems), None)
    if problem is None:
        return True, ""
    if config.fused_layers is True:
        raise ConfigError(f"fused_layers=true: {problem}")
    return False, f"layers: as PEFT computes them, which takes longer; fused ones: {problem}"


def kernel_problem(config: Config, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels are not to be used on this rank, None where they are right."""
    for op in FUSED_OPS:
        reason = check_results.failure_reason("fused", f"fused {op}")
        if reason:
            return reason
    if device.type != "cuda":
        return None
    for rank in sorted({config.lora["r"], *config.lora.get("rank_pattern", {}).values()}):
        failure = check_results.run_once(
            f"fused kernels, LoRA of rank {rank}, {dtype}",
            device,
            functools.partial(find_failing_kernel, device, rank, dtype),
        )
        if failure:
            return failure
    return None


def choose_dequantized(
    config: Config, layers: nn.ModuleList, free_bytes: int | None, use_cuda_graphs: bool
) -> bool:
    """Whether dequantised copies of the quantised weights are kept as well.

    With "auto" they are where they take at most a tenth of the free memory and layers are launched
    kernel by kernel. Where layers are replayed as CUDA graphs the copies gain 0.3 %.
    free_bytes: of the GPU; None on a CPU, whose free memory is looked up.
    """
    if config.cache_dequantized_weights != "auto":
        return config.cache_dequantized_weights
    if free_bytes is None:
        free_bytes = psutil.virtual_memory().available
    linears: list[Any] = [m for m in layers.modules() if find_quantization(m)]
    size = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in linears)
    return size <= 0.1 * free_bytes and not use_cuda_graphs


# ---- the installation


def install_fused_parts(layers: nn.ModuleList, cache_dequantized: bool) -> set[str]:
    """Installs the fused parts in the decoder layers, before the engine gets the model.

    Norms, feed-forward blocks and rotary positions that compute something else stay as they are,
    and so does LoRA with additions (DoRA and its like). Parameters are read outside of the modules
    that own them, so ZeRO-3 has to gather decoder layers as leaf modules.
    Returns what stayed, by class or function.
    """
    unfused: set[str] = set()
    grouped: set[nn.Module] = set()  # linear layers that are computed together with others

    def loras(modules: list[nn.Module]) -> list[LoraLinear]:
        return [LoraLinear(module, cache_dequantized) for module in modules]

    for layer in layers:
        for module in layer.modules():
            name = type(module).__name__
            if name.endswith("Norm"):
                if not fuse_norm(module):
                    unfused.add(name)
            elif projections := attention_inputs(module):
                install_fused_forward(projections, loras(projections), FusedLinears)
                grouped.update(projections)
            elif hasattr(module, "gate_proj"):
                linears = feed_forward_linears(module)
                if linears:
                    install_fused_forward([module], loras(linears), FusedFeedForward)
                    grouped.update(linears)
                else:
                    unfused.add(name)
            elif is_plain_lora(module):
                if module not in grouped:
                    install_fused_forward([module], loras([module]), FusedLinears)
            elif hasattr(module, "lora_A"):
                unfused.add(name)
        unfused |= fuse_rotary(layer)
    return unfused


def install_fused_forward(
    modules: list[nn.Module], linears: list[LoraLinear], function: type[torch.autograd.Function]
) -> None:
    """Lets the modules, which are called in turn with one tensor, compute together by `function`.

    linears: the layers that the function reads; it returns an output for each module.
    """
    shared = SharedForward(linears, function)
    for number, module in enumerate(modules):
        module.forward = fused_forward(module, number, shared)


def fused_forward(module: nn.Module, number: int, shared: SharedForward) -> Callable:
    """The forward of a module whose output is number `number` of `shared`."""
    unfused = module.forward

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        one_token = x.shape[-2] == 1 and not (module.training or torch.is_grad_enabled())
        if one_token:  # of a generation: bitsandbytes has a kernel that needs no dequantised weight
            return unfused(x, *args, **kwargs)
        return shared.fetch(x, number)

    return forward


def attention_inputs(module: nn.Module) -> list[nn.Module]:
    """The projections to queries, keys and values; [] where they can't be computed together."""
    names = ("q_proj", "k_proj", "v_proj")
    projections = [getattr(module, name) for name in names if hasattr(module, name)]
    if len(projections) == 3 and are_alike(projections):
        return projections
    return []


def feed_forward_linears(module: Any) -> list[nn.Module]:
    """The linear layers gate, up and down of a block; [] where it is not SwiGLU of plain LoRAs."""
    linears = [module.gate_proj, module.up_proj, module.down_proj]
    if is_swiglu(module) and are_alike(linears[:2]) and is_plain_lora(linears[2]):
        return linears
    return []


# ---- what a module computes


def is_plain_lora(module: Any) -> bool:
    """Whether it is a linear layer with one LoRA and nothing else.

    There is no DoRA or the like, no bias of LoRA's own, and no bias that is trained.
    """
    lora_layers = (PeftLinear, *(q.lora_layer for q in QUANTIZATIONS.values()))
    if type(module) not in lora_layers or len(module.active_adapters) != 1 or module.merged:
        return False
    (name,) = module.active_adapters
    trains_bias = module.base_layer.bias is not None and module.base_layer.bias.requires_grad
    transposed = getattr(module, "fan_in_fan_out", False)
    return not (module.lora_variant or module.lora_bias.get(name) or trains_bias or transposed)


def are_alike(modules: list[Any]) -> bool:
    """Whether their LoRAs can be computed together: plain ones of one rank and scaling."""
    if not all(map(is_plain_lora, modules)):
        return False
    adapters = [module.active_adapters[0] for module in modules]
    kinds = {(m.r[adapter], m.scaling[adapter]) for m, adapter in zip(modules, adapters)}
    return len(kinds) == 1


def seeded_randn(*shape: int) -> torch.Tensor:
    """Random numbers that leave the run's own generator as it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def is_swiglu(module: nn.Module) -> bool:
    """Whether the block computes SwiGLU: its own code is run on stand-ins for its linear layers."""
    x = seeded_randn(64)
    stand_in = SimpleNamespace(
        gate_proj=lambda x: 2 * x,
        up_proj=lambda x: x + 1,
        down_proj=lambda x: 3 * x,
        act_fn=getattr(module, "act_fn", None),
    )
    try:
        return torch.allclose(type(module).forward(stand_in, x), 3 * F.silu(2 * x) * (x + 1))
    except (AttributeError, TypeError):
        return False


def fuse_norm(module: Any) -> bool:
    """Replaces an RMSNorm (arXiv 1910.07467) by torch's; False where it computes something else.

    torch's is one kernel. Written out in PyTorch, as in transformers, it takes six, through fp32.
    """
    x = seeded_randn(4, 64)
    weight = seeded_randn(64)
    eps = getattr(module, "variance_epsilon", None)
    stand_in = SimpleNamespace(weight=weight, variance_epsilon=eps)
    try:
        theirs = type(module).forward(stand_in, x)
        same = torch.allclose(theirs, F.rms_norm(x, (64,), weight, eps), atol=1e-5)
    except (AttributeError, TypeError):
        return False
    if same:
        module.forward = lambda x: F.rms_norm(x, x.shape[-1:], module.weight, eps)
    return same


def fuse_rotary(layer: nn.Module) -> set[str]:
    """Patches the rotary positions of the layer's attention; returns their name if they differ.

    In transformers they are a function of the module that defines the attention.
    """
    attentions = (m for m in layer.modules() if hasattr(m, "q_proj"))
    attention = next(attentions, None)
    if attention is None:
        return set()
    module = sys.modules[type(attention).__module__]
    original = getattr(module, "apply_rotary_pos_emb", None)
    if original is None or is_rotary_patched(module):
        return set()
    q = seeded_randn(1, 4, 8, 16)
    k = seeded_randn(1, 2, 8, 16)
    angle = seeded_randn(1, 8, 8).repeat(1, 1, 2)
    cos = angle.cos()
    sin = angle.sin()
    try:
        theirs = original(q, k, cos, sin)
        ours = FusedRotary.apply(q, k, cos, sin)
        same = all(map(torch.allclose, theirs, ours))
    except (TypeError, RuntimeError):
        same = False
    if not same:
        return {"apply_rotary_pos_emb"}
    patch_rotary(module)
    return set()
