"""Parts of a decoder layer as autograd functions in few kernels, and the LoRA that they read.

A QLoRA step lacks neither arithmetic nor memory. What holds it back are kernel launches, and the
reading and writing of activations. These functions compute what PEFT and transformers compute, term
by term. They round to bf16 less often between the terms and save less for the backward pass.
The terms are in lora_ops.py. fuse.py installs the functions in a model.
"""

from typing import Any

import deepspeed
import torch
import torch.nn as nn

from .lora_ops import (
    grad_lora_a,
    grad_lora_b,
    lora_down,
    lora_grad_input,
    rotate,
    swiglu,
    swiglu_backward,
)
from .quantization import find_quantization


class LoraLinear:
    """A frozen linear layer with its LoRA, y = x W^T + bias + s (drop(x) A^T) B^T.

    x [T, K], W [N, K], A [r, K], B [N, r], y [T, N]. Parameters are looked up in every call: ZeRO-3
    may take them away and bring them back between two calls.

    cache_dequantized: keep the dequantised weight, in bf16 for 2 bytes a weight, instead of making
    it again in each pass. The numbers are the same.
    """

    def __init__(self, module: Any, cache_dequantized: bool) -> None:
        # Any: PEFT does not declare what its layers hold.
        (self.adapter,) = module.active_adapters
        self.module = module
        self.scaling = module.scaling[self.adapter]
        self.quantization = find_quantization(module.base_layer)
        self.cached_weight: torch.Tensor | None = None
        if cache_dequantized and self.quantization:
            self.cached_weight = self.full_weight()

    @property
    def lora(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(A [r, K], B [N, r])."""
        return self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W [N, K]."""
        if self.cached_weight is not None:
            return self.cached_weight
        if self.quantization:
            return self.quantization.dequantize(self.module.base_layer, dtype)
        return self.module.base_layer.weight

    def full_weight(self) -> torch.Tensor:
        """W [N, K], a tensor of its own. Every rank must call it: ZeRO-3 may have to gather."""
        stored = self.module.base_layer.weight
        dtype = self.module.base_layer.compute_dtype if self.quantization else stored.dtype
        with deepspeed.zero.GatheredParameters([stored], enabled=hasattr(stored, "ds_id")):
            weight = self.weight(dtype)
            return weight if self.quantization else weight.detach().clone()

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias [T, N], without LoRA."""
        weight = self.weight(x.dtype)
        bias = self.module.base_layer.bias
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    def forward(self, x: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """y [T, N] from h = s drop(x) A^T [T, r].

        LoRA's part is written first: a product that adds takes hardly longer than one that writes.
        """
        weight = self.weight(x.dtype)
        bias = self.module.base_layer.bias
        y = h @ b.t() if bias is None else torch.addmm(bias, h, b.t())
        return y.addmm_(x, weight.t())


class LinearGroup:
    """Linear layers of one input x [T, K], such as queries, keys and values.

    A subclass may multiply by the frozen weights in another way (`fp8/layers.py`).
    """

    def __init__(self, linears: list[LoraLinear]) -> None:
        self.linears = linears

    def dropout(self) -> tuple[tuple[torch.Tensor, ...] | None, float]:
        """This micro-batch's (keep_masks, scale) for the layers' LoRAs, as lora_ops takes them.

        keep_masks has for each LoRA a bool [T, K], or is None where nothing is dropped.
        """
        linears = self.linears
        dropouts = [linear.module.lora_dropout[linear.adapter] for linear in linears]
        if not linears[0].module.training or isinstance(dropouts[0], nn.Identity):
            return None, linears[0].scaling
        masks = [dropout.mask(x.module.in_features) for dropout, x in zip(dropouts, linears)]
        _, dropout_scale = masks[0]
        return tuple(keep for keep, _ in masks), dropout_scale * linears[0].scaling

    def base(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T + bias [T, N] of each layer, without LoRA."""
        return [linear.base(x) for linear in self.linears]

    def outputs(self, x: torch.Tensor, hs, lora_bs) -> tuple[torch.Tensor, ...]:
        """y [T, N] of each layer, where each h [T, r] is s drop(x) A^T."""
        return tuple(linear.forward(x, h, b) for linear, h, b in zip(self.linears, hs, lora_bs))

    def grad_input(self, dys, dhs, lora_as, dropout) -> torch.Tensor:
        """dx [T, K] from the gradients dy [T, N] of the outputs and dh = dy B [T, r] of each."""
        dx = lora_grad_input(dhs, lora_as, *dropout)
        for linear, dy in zip(self.linears, dys):
            dx.addmm_(dy, linear.weight(dy.dtype))
        return dx


def grad_lora_bs(dys, hs, lora_bs) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(dh [T, r] of each layer, dB [N, r] of each)."""
    dhs, dbs = zip(*map(grad_lora_b, dys, hs, lora_bs))
    return dhs, dbs


def alternate(das, dbs) -> list[torch.Tensor]:
    """dA and dB of each layer in turn."""
    return [gradient for pair in zip(das, dbs) for gradient in pair]


class FusedLinears(torch.autograd.Function):
    """Linear layers of one input.

    Takes their group alone in a list, x [T, K], and A and B of each in turn. Returns y [T, N] of
    each.
    """

    @staticmethod
    def forward(ctx, groups: list[LinearGroup], x, *lora):
        (group,) = groups
        ctx.group = group
        ctx.dropout = group.dropout()
        lora_as, lora_bs = lora[::2], lora[1::2]
        hs = lora_down(x, lora_as, *ctx.dropout)
        ctx.save_for_backward(x, *hs, *lora)
        return group.outputs(x, hs, lora_bs)

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        hs, lora = saved[: len(dys)], saved[len(dys) :]
        lora_as, lora_bs = lora[::2], lora[1::2]
        dhs, dbs = grad_lora_bs(dys, hs, lora_bs)
        dx = ctx.group.grad_input(dys, dhs, lora_as, ctx.dropout)
        return None, dx, *alternate(grad_lora_a(dhs, x, *ctx.dropout), dbs)


class FusedFeedForward(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202).

    Takes the group of gate and up and that of down, x [T, K], and A and B of each layer in turn. It
    saves the outputs of gate and up before their LoRA is added, and computes silu(gate) * up again
    in the backward pass.
    """

    @staticmethod
    def forward(ctx, groups: list[LinearGroup], x, *lora):
        inputs, output = groups
        gate_a, gate_b, up_a, up_b, down_a, down_b = lora
        ctx.groups = groups
        ctx.dropout = inputs.dropout()
        ctx.down_dropout = output.dropout()
        gate_h, up_h = lora_down(x, (gate_a, up_a), *ctx.dropout)
        gate, up = inputs.base(x)
        hidden = swiglu(gate, up, (gate_h, gate_b), (up_h, up_b))
        (down_h,) = lora_down(hidden, (down_a,), *ctx.down_dropout)
        ctx.save_for_backward(x, gate, up, gate_h, up_h, down_h, *lora)
        return output.outputs(hidden, (down_h,), (down_b,))

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, gate_h, up_h, down_h, *lora = ctx.saved_tensors
        lora_as, lora_bs = lora[::2], lora[1::2]  # of gate, up and down
        inputs, output = ctx.groups
        down_dhs, down_dbs = grad_lora_bs((dy,), (down_h,), lora_bs[2:])
        d_hidden = output.grad_input((dy,), down_dhs, lora_as[2:], ctx.down_dropout)
        *dys, hidden = swiglu_backward(d_hidden, gate, up, (gate_h, lora_bs[0]), (up_h, lora_bs[1]))
        down_das = grad_lora_a(down_dhs, hidden, *ctx.down_dropout)
        dhs, dbs = grad_lora_bs(dys, (gate_h, up_h), lora_bs[:2])
        dx = inputs.grad_input(dys, dhs, lora_as[:2], ctx.dropout)
        das = grad_lora_a(dhs, x, *ctx.dropout)
        return None, dx, *alternate((*das, *down_das), (*dbs, *down_dbs))


class FusedRotary(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864) of queries and keys. The gradient is the rotation back.

    q [B, Hq, T, D], k [B, Hkv, T, D], cos and sin [B, T, D]. Both halves of a head turn by the same
    angles.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return rotate(dq, cos, -sin), rotate(dk, cos, -sin), None, None


class SharedForward:
    """One call of an autograd function for several modules, each of which fetches its output.

    The modules are called one after the other with the same tensor object, as q_proj, k_proj and
    v_proj are. Once all have fetched, nothing is held, so no activation is kept alive.

    function: takes the groups, x [T, K], and A and B of each layer; returns an output for each
    module.
    """

    def __init__(self, groups: list[LinearGroup], function: type[torch.autograd.Function]) -> None:
        self.groups = groups
        self.function = function
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = []  # of each module; None once it is fetched

    def compute_once(self, x: torch.Tensor, number: int) -> None:
        """Computes all outputs, unless that of module `number` for this very x is waiting."""
        if self.input is x and self.outputs[number] is not None:
            return
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        linears = (linear for group in self.groups for linear in group.linears)
        lora = (parameter for linear in linears for parameter in linear.lora)
        self.outputs = list(self.function.apply(self.groups, flat, *lora))
        self.input = x

    def fetch(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """The output of module `number` for x [..., K]: [..., N]."""
        self.compute_once(x, number)
        output = self.outputs[number]
        assert output is not None
        self.outputs[number] = None
        if all(other is None for other in self.outputs):
            self.input = None
            self.outputs = []
        return output.view(*x.shape[:-1], -1)
