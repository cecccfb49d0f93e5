"""What makes the step fast: linear layers with their LoRA, the feed-forward block, norms and rotary positions in few kernels.

A QLoRA step lacks neither arithmetic nor memory: it is held back by kernel launches and by reading and writing activations. What stands
here computes what PEFT and transformers compute, term by term, with fewer roundings to bf16 between the terms, and keeps less
for the backward pass. On GPUs the kernels are Triton's, elsewhere the same terms are written in plain PyTorch.
`fuse` first runs each part against the one that it replaces and leaves alone what differs.
"""

import sys
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
from .fused_layers import FusedFeedForward, FusedLinears, FusedRotary, LoraLinear
from .quantization import QUANTIZATIONS, find_quantization
from .self_test import fails_here

# ------------------------------------------------------------------ what is put in place of what


def choose_layers(config: Config, dtype: torch.dtype, ranks: Ranks) -> tuple[bool, str]:
    """(whether layers are fused, what a person should know of it): `config.fused_layers`, except that "auto" does not take kernels that were found
    wrong by `./launch.sh check`, or fail here. All ranks get the same answer, and every rank must call it. Raises ConfigError, on all of
    them, when the kernels are asked for and fail."""
    terms, wrong = ("down", "grad_down", "up", "swiglu", "swiglu_backward", "rotate"), None
    if config.fused_layers:
        wrong = next(
            filter(
                None, (check_results.failure_reason("fused", f"fused {term}") for term in terms)
            ),
            None,
        )
        if not wrong and ranks.device.type == "cuda":
            sizes = {config.lora["r"], *config.lora.get("rank_pattern", {}).values()}
            wrong = next(
                filter(None, (fails_here(ranks.device, size, dtype) for size in sorted(sizes))),
                None,
            )
        wrong = next(filter(None, ranks.all_gather_json(wrong)), None)
    if wrong and config.fused_layers is True:
        raise ConfigError(f"fused_layers=true: {wrong}")
    return (
        bool(config.fused_layers) and not wrong,
        f"layers: as PEFT computes them, which takes longer; fused ones: {wrong}" if wrong else "",
    )


def choose_dequantized(
    config: Config, layers: nn.ModuleList, free_bytes: int | None, replayed: bool
) -> bool:
    """Whether NF4 weights are kept dequantised as well; `auto`: where that takes at most a tenth of the free memory (None: a CPU's), and layers
    are launched kernel by kernel. Where they are replayed it gains 0.3 %."""
    linears: list[Any] = [m for m in layers.modules() if find_quantization(m)]
    size = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in linears)
    room = size <= 0.1 * (psutil.virtual_memory().available if free_bytes is None else free_bytes)
    return (
        room and not replayed
        if config.cache_dequantized_weights == "auto"
        else config.cache_dequantized_weights
    )


def fuse(layers: nn.ModuleList, keep_dense: bool) -> set[str]:
    """Puts the functions above in the place of the decoder layers' own, before the engine gets the model. A norm, a feed-forward block or
    rotary positions that compute something else than ours do stay as they are, and so does LoRA with additions (DoRA and its like).
    Parameters are read outside of the modules that own them: ZeRO-3 has to gather layers whole, as leaf modules. Returns what stayed, by class
    or function."""
    stayed, done = set(), set()
    for layer in layers:
        for module in layer.modules():
            inner = [
                getattr(module, part)
                for part in ("q_proj", "k_proj", "v_proj")
                if hasattr(module, part)
            ]
            if type(module).__name__.endswith("Norm"):
                stayed |= set() if fuse_norm(module) else {type(module).__name__}
            elif len(inner) == 3 and are_alike(inner):
                install_fused_forward(
                    inner, [LoraLinear(m, keep_dense) for m in inner], FusedLinears
                )
                done |= set(inner)
            elif hasattr(module, "gate_proj"):
                inner = [module.gate_proj, module.up_proj, module.down_proj]
                if is_swiglu(module) and are_alike(inner[:2]) and is_plain_lora(inner[2]):
                    install_fused_forward(
                        [module], [LoraLinear(m, keep_dense) for m in inner], FusedFeedForward
                    )
                    done |= set(inner)
                else:
                    stayed.add(type(module).__name__)
            elif is_plain_lora(module) and module not in done:
                install_fused_forward([module], [LoraLinear(module, keep_dense)], FusedLinears)
            elif hasattr(module, "lora_A") and not is_plain_lora(module):
                stayed.add(type(module).__name__)
        stayed |= fuse_rotary(layer)
    return stayed


def install_fused_forward(
    modules: list[nn.Module], linears: list[LoraLinear], function: type[torch.autograd.Function]
) -> None:
    """Lets the modules, which are called one after the other with the same tensor object, compute their outputs by `function` at the first one's
    turn. The others fetch theirs; once all have, nothing is held, so no activation is kept alive."""
    waiting: list = [None]  # that input, then the output of each module that has not fetched it
    for number, module in enumerate(modules):

        def forward(
            x: torch.Tensor, *args, number=number, module=module, plain=module.forward, **kwargs
        ) -> torch.Tensor:
            if x.shape[-2] == 1 and not (module.training or torch.is_grad_enabled()):
                return plain(
                    x, *args, **kwargs
                )  # one token of a generation: bitsandbytes has a kernel that needs no dense W
            if waiting[0] is not x or waiting[1 + number] is None:
                flat = x.reshape(-1, x.shape[-1]).contiguous()
                waiting[:] = [
                    x,
                    *function.apply(linears, flat, *(p for linear in linears for p in linear.lora)),
                ]
            y, waiting[1 + number] = waiting[1 + number], None
            if not any(y is not None for y in waiting[1:]):
                waiting[:] = [None]
            return y.view(*x.shape[:-1], -1)

        module.forward = forward


def is_plain_lora(module: Any) -> bool:
    """Whether it is a linear layer with one LoRA and nothing else: no DoRA or the like, no bias of LoRA's own, none that is trained."""
    lora_layers = (PeftLinear, *(q.lora_layer for q in QUANTIZATIONS.values()))
    if (
        type(module) not in lora_layers
        or len(module.active_adapters) != 1
        or module.merged
    ):
        return False
    (name,) = module.active_adapters
    trains_bias = module.base_layer.bias is not None and module.base_layer.bias.requires_grad
    return not (
        module.lora_variant
        or module.lora_bias.get(name)
        or trains_bias
        or getattr(module, "fan_in_fan_out", False)
    )


def are_alike(modules: list[Any]) -> bool:
    """Whether their LoRAs can be computed together: of one rank and scaling."""
    return (
        all(map(is_plain_lora, modules))
        and len({(m.r[m.active_adapters[0]], m.scaling[m.active_adapters[0]]) for m in modules})
        == 1
    )


def random_numbers(*shape: int) -> torch.Tensor:
    """Random ones that leave the run's own generator as it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def is_swiglu(module: nn.Module) -> bool:
    """Runs the block's own code on stand-ins for its linear layers."""
    x = random_numbers(64)
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


def fuse_norm(module: nn.Module) -> bool:
    """torch has RMSNorm (arXiv 1910.07467) in one kernel; written out in PyTorch as in transformers it takes six, through fp32."""
    x, weight, eps = (
        random_numbers(4, 64),
        random_numbers(64),
        getattr(module, "variance_epsilon", None),
    )
    stand_in = SimpleNamespace(weight=weight, variance_epsilon=eps)
    try:
        same = torch.allclose(
            type(module).forward(stand_in, x), F.rms_norm(x, (64,), weight, eps), atol=1e-5
        )
    except (AttributeError, TypeError):
        return False
    if same:
        module.forward = lambda x: F.rms_norm(x, x.shape[-1:], module.weight, eps)  # type: ignore[arg-type]  # a norm's weight is a tensor
    return same


def fuse_rotary(layer: nn.Module) -> set[str]:
    """Rotary positions are a function of the attention's module in transformers, so that is where ours has to be put."""
    home: Any = next(
        (sys.modules[type(m).__module__] for m in layer.modules() if hasattr(m, "q_proj")), None
    )
    plain = getattr(home, "apply_rotary_pos_emb", None)
    if plain is None or hasattr(plain, "plain"):
        return set()
    q, k, angle = (
        random_numbers(1, 4, 8, 16),
        random_numbers(1, 2, 8, 16),
        random_numbers(1, 8, 8).repeat(1, 1, 2),
    )
    try:
        same = all(
            map(
                torch.allclose,
                plain(q, k, angle.cos(), angle.sin()),
                FusedRotary.apply(q, k, angle.cos(), angle.sin()),
            )
        )
    except (TypeError, RuntimeError):
        same = False
    if not same:
        return {"apply_rotary_pos_emb"}

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        if args or kwargs or cos.shape != (q.shape[0], *q.shape[2:]):
            return plain(q, k, cos, sin, *args, **kwargs)
        return FusedRotary.apply(q, k, cos, sin)

    apply_rotary_pos_emb.plain = plain  # type: ignore[attr-defined]  # a mark; mypy has no attributes of functions
    home.apply_rotary_pos_emb = apply_rotary_pos_emb
    return set()
