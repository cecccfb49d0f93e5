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

from .lora_ops import grad_lora_a, lora_down, lora_grad_input, rotate, swiglu, swiglu_backward
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
            weight = module.base_layer.weight
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                self.cached_weight = self.weight(module.base_layer.compute_dtype)

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


def dropout_of_input(
    linears: list[LoraLinear],
) -> tuple[tuple[torch.Tensor, ...] | None, float]:
    """This micro-batch's (keep_masks, scale) for LoRAs of one input, as lora_ops takes them.

    keep_masks has for each LoRA a bool [T, K], or is None where nothing is dropped.
    """
    dropouts = [linear.module.lora_dropout[linear.adapter] for linear in linears]
    if not linears[0].module.training or isinstance(dropouts[0], nn.Identity):
        return None, linears[0].scaling
    masks = [dropout.mask(linear.module.in_features) for dropout, linear in zip(dropouts, linears)]
    _, dropout_scale = masks[0]
    return tuple(keep for keep, _ in masks), dropout_scale * linears[0].scaling


def grad_input(
    linears: list[LoraLinear], dys, lora, dropout
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(dx [T, K], dh [T, r] of each layer) of linear layers of one input.

    dys: the gradients [T, N] of their outputs; lora: A and B of each in turn; dropout:
    (keep_masks, scale).
    """
    lora_as = lora[::2]
    lora_bs = lora[1::2]
    dhs = [dy @ b for dy, b in zip(dys, lora_bs)]
    dx = lora_grad_input(dhs, lora_as, *dropout)
    for linear, dy in zip(linears, dys):
        dx.addmm_(dy, linear.weight(dy.dtype))
    return dx, dhs


def grad_lora(dys, dhs, x: torch.Tensor, hs, dropout) -> list[torch.Tensor]:
    """dA [r, K] and dB [N, r] of each layer in turn, for linear layers of one input x."""
    gradients = []
    for da, dy, h in zip(grad_lora_a(dhs, x, *dropout), dys, hs):
        gradients += [da, dy.t() @ h]
    return gradients


class FusedLinears(torch.autograd.Function):
    """Linear layers of one input, such as queries, keys and values.

    Takes the layers, x [T, K], and A and B of each in turn. Returns y [T, N] of each.
    """

    @staticmethod
    def forward(ctx, linears: list[LoraLinear], x, *lora):
        ctx.linears = linears
        ctx.dropout = dropout_of_input(linears)
        lora_as = lora[::2]
        lora_bs = lora[1::2]
        hs = lora_down(x, lora_as, *ctx.dropout)
        ctx.save_for_backward(x, *hs, *lora)
        return tuple(linear.forward(x, h, b) for linear, h, b in zip(linears, hs, lora_bs))

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        hs = saved[: len(dys)]
        lora = saved[len(dys) :]
        dx, dhs = grad_input(ctx.linears, dys, lora, ctx.dropout)
        return None, dx, *grad_lora(dys, dhs, x, hs, ctx.dropout)


class FusedFeedForward(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202).

    Takes the layers gate, up and down, x [T, K], and A and B of each in turn. It saves the outputs
    of gate and up before their LoRA is added, and computes silu(gate) * up again in the backward
    pass.
    """

    @staticmethod
    def forward(ctx, linears: list[LoraLinear], x, *lora):
        gate_linear, up_linear, down_linear = linears
        gate_a, gate_b, up_a, up_b, down_a, down_b = lora
        ctx.linears = linears
        ctx.dropout = dropout_of_input([gate_linear, up_linear])
        ctx.down_dropout = dropout_of_input([down_linear])
        gate_h, up_h = lora_down(x, (gate_a, up_a), *ctx.dropout)
        gate = gate_linear.base(x)
        up = up_linear.base(x)
        hidden = swiglu(gate, up, (gate_h, gate_b), (up_h, up_b))
        (down_h,) = lora_down(hidden, (down_a,), *ctx.down_dropout)
        ctx.save_for_backward(x, gate, up, gate_h, up_h, down_h, *lora)
        return (down_linear.forward(hidden, down_h, down_b),)

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, gate_h, up_h, down_h, *lora = ctx.saved_tensors
        _, gate_b, _, up_b, _, _ = lora
        inputs = ctx.linears[:2]
        output = ctx.linears[2:]
        d_hidden, down_dh = grad_input(output, (dy,), lora[4:], ctx.down_dropout)
        d_gate, d_up, hidden = swiglu_backward(d_hidden, gate, up, (gate_h, gate_b), (up_h, up_b))
        down_gradients = grad_lora((dy,), down_dh, hidden, (down_h,), ctx.down_dropout)
        dys = (d_gate, d_up)
        dx, dhs = grad_input(inputs, dys, lora[:4], ctx.dropout)
        gradients = grad_lora(dys, dhs, x, (gate_h, up_h), ctx.dropout)
        return None, dx, *gradients, *down_gradients


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

    function: takes the layers, x [T, K], and A and B of each; returns an output for each module.
    """

    def __init__(self, linears: list[LoraLinear], function: type[torch.autograd.Function]) -> None:
        self.linears = linears
        self.function = function
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = []  # of each module; None once it is fetched

    def compute_once(self, x: torch.Tensor, number: int) -> None:
        """Computes all outputs, unless that of module `number` for this very x is waiting."""
        if self.input is x and self.outputs[number] is not None:
            return
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        lora = (parameter for linear in self.linears for parameter in linear.lora)
        self.outputs = list(self.function.apply(self.linears, flat, *lora))
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
