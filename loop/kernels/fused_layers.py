"""What makes the step fast: linear layers with their LoRA, the feed-forward block, norms and rotary positions in few kernels.

A QLoRA step lacks neither arithmetic nor memory: it is held back by kernel launches and by reading and writing activations. What stands
here computes what PEFT and transformers compute, term by term, with fewer roundings to bf16 between the terms, and keeps less
for the backward pass. On GPUs the kernels are Triton's, elsewhere the same terms are written in plain PyTorch.
`fuse` first runs each part against the one that it replaces and leaves alone what differs.
"""

from typing import Any

import deepspeed
import torch
import torch.nn as nn

from .lora_ops import grad_lora_a, lora_down, lora_grad_input, rotate, swiglu, swiglu_backward
from .quantization import find_quantization


class LoraLinear:
    """A frozen linear layer with its LoRA, y = x W^T + b + s (drop(x) A^T) B^T. x [T, K], A [r, K], B [N, r].

    Its parameters are looked up in every call: between two calls ZeRO-3 may have taken them away and brought them back. keep_dense: the
    dequantised weight is kept, in bf16 for 2 bytes a weight, instead of being made again in each pass; the numbers are the same."""

    def __init__(
        self, module: Any, keep_dense: bool
    ) -> None:  # Any: PEFT does not declare what is in its layers' parts
        (self.adapter,), self.module, self.dense = module.active_adapters, module, None
        self.scaling = module.scaling[self.adapter]
        self.quantization = find_quantization(module.base_layer)
        weight = module.base_layer.weight
        if keep_dense and self.quantization:
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                self.dense = self.weight(module.base_layer.compute_dtype)

    @property
    def lora(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W [N, K]"""
        if self.dense is not None:
            return self.dense
        if self.quantization:
            return self.quantization.dequantize(self.module.base_layer, dtype)
        return self.module.base_layer.weight

    def base(self, x: torch.Tensor) -> torch.Tensor:
        w, bias = self.weight(x.dtype), self.module.base_layer.bias
        return x @ w.t() if bias is None else torch.addmm(bias, x, w.t())

    def forward(self, x: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """y [T, N] from h = s drop(x) A^T. LoRA's part is written first: a product that adds takes hardly longer than one that writes."""
        w, bias = self.weight(x.dtype), self.module.base_layer.bias
        return (h @ b.t() if bias is None else torch.addmm(bias, h, b.t())).addmm_(x, w.t())


def draw(linears: list[LoraLinear]) -> tuple[tuple[torch.Tensor, ...] | None, float]:
    """This micro-batch's dropout for LoRAs of one input as kernels.py wants it: (a mask for each, bool [T, K], or None, what is multiplied by)."""
    dropouts = [linear.module.lora_dropout[linear.adapter] for linear in linears]
    if not linears[0].module.training or isinstance(dropouts[0], nn.Identity):
        return None, linears[0].scaling
    masks = [dropout.mask(linear.module.in_features) for dropout, linear in zip(dropouts, linears)]
    return tuple(keep for keep, _ in masks), masks[0][1] * linears[0].scaling


def grad_input(
    linears: list[LoraLinear], dys, lora, drop
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(dx [T, K], dh [T, r] of each)"""
    dhs = [dy @ b for dy, b in zip(dys, lora[1::2])]
    dx = lora_grad_input(dhs, lora[::2], *drop)
    for linear, dy in zip(linears, dys):
        dx.addmm_(dy, linear.weight(dy.dtype))
    return dx, dhs


def grad_lora(dys, dhs, x: torch.Tensor, hs, drop) -> list[torch.Tensor]:
    """dA [r, K], dB [N, r] of each in turn."""
    return [
        grad for da, dy, h in zip(grad_lora_a(dhs, x, *drop), dys, hs) for grad in (da, dy.t() @ h)
    ]


class FusedLinears(torch.autograd.Function):
    """Linear layers of one input, as queries, keys and values are."""

    @staticmethod
    def forward(ctx, linears: list[LoraLinear], x, *lora):
        ctx.linears, ctx.drop = linears, draw(linears)
        hs = lora_down(x, lora[::2], *ctx.drop)
        ctx.save_for_backward(x, *hs, *lora)
        return tuple(linear.forward(x, h, b) for linear, h, b in zip(linears, hs, lora[1::2]))

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        hs, lora = saved[: len(dys)], saved[len(dys) :]
        dx, dhs = grad_input(ctx.linears, dys, lora, ctx.drop)
        return None, dx, *grad_lora(dys, dhs, x, hs, ctx.drop)


class FusedFeedForward(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202). Kept are g and u, before their LoRA is added; silu(gate) * up is made again."""

    @staticmethod
    def forward(ctx, linears: list[LoraLinear], x, *lora):
        (gate, lift, last), (_, bg, _, bu, a, b) = (
            linears,
            lora,
        )  # gate_proj, up_proj, down_proj; A and B of each
        ctx.linears, ctx.drops = linears, (draw(linears[:2]), draw(linears[2:]))
        hg, hu = lora_down(x, lora[:4:2], *ctx.drops[0])
        g, u = gate.base(x), lift.base(x)
        m = swiglu(g, u, (hg, bg), (hu, bu))
        (hm,) = lora_down(m, (a,), *ctx.drops[1])
        ctx.save_for_backward(x, g, u, hg, hu, hm, *lora)
        return (last.forward(m, hm, b),)

    @staticmethod
    def backward(ctx, dy):
        x, g, u, hg, hu, hm, *lora = ctx.saved_tensors
        drop, drop_m = ctx.drops
        dm, dhm = grad_input(ctx.linears[2:], (dy,), lora[4:], drop_m)
        dg, du, m = swiglu_backward(dm, g, u, (hg, lora[1]), (hu, lora[3]))
        of_last = grad_lora((dy,), dhm, m, (hm,), drop_m)
        dx, dhs = grad_input(ctx.linears[:2], (dg, du), lora[:4], drop)
        return None, dx, *grad_lora((dg, du), dhs, x, (hg, hu), drop), *of_last


class FusedRotary(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864) of queries and keys; the gradient is the rotation back.
    q [B, Hq, T, D], k [B, Hkv, T, D], cos and sin [B, T, D]; both halves of a head turn by the same angles."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return rotate(dq, cos, -sin), rotate(dk, cos, -sin), None, None
