"""Layers of one input whose frozen weights are multiplied in FP8 while they train."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels.fused_layers import LinearGroup, LoraLinear
from ..kernels.lora_ops import lora_grad_input, lora_up
from .products import Quantized, product, quantize_rows


class Fp8Group(LinearGroup):
    """A group whose frozen products are in FP8, and whose LoRAs are not.

    It is so in training alone: a validation loss is that of the adapter on the base as it is
    stored, which is what the run exports.

    Each pass sums over another axis of W, and so takes codes of its own: a scale for each row of
    what it sums over. One set of codes for both would have its scales along the sum of one pass.

    keep: hold the codes, 2 bytes a weight, instead of making them again in each pass.
    """

    def __init__(self, linears: list[LoraLinear], keep: bool) -> None:
        super().__init__(linears)
        self.kept: tuple[list[Quantized], Quantized] | None = None
        if keep:
            weights = [linear.full_weight() for linear in linears]
            self.kept = quantize_outputs(weights), quantize_inputs(weights)

    @property
    def in_fp8(self) -> bool:
        return self.linears[0].module.training

    def weights(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [linear.weight(dtype) for linear in self.linears]

    def base(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T + bias [T, N] of each layer, without LoRA. x is quantised once for all."""
        if not self.in_fp8:
            return super().base(x)
        weights = self.kept[0] if self.kept else quantize_outputs(self.weights(x.dtype))
        biases = [linear.module.base_layer.bias for linear in self.linears]
        codes = quantize_rows(x)
        return [product(codes, w, x.dtype, bias) for w, bias in zip(weights, biases)]

    def outputs(self, x: torch.Tensor, hs, lora_bs) -> tuple[torch.Tensor, ...]:
        if not self.in_fp8:
            return super().outputs(x, hs, lora_bs)
        return tuple(map(lora_up, self.base(x), hs, lora_bs))

    def grad_input(self, dys, dhs, lora_as, dropout) -> torch.Tensor:
        """One product for all layers: their gradients side by side, their weights above another."""
        if not self.in_fp8:
            return super().grad_input(dys, dhs, lora_as, dropout)
        dtype = dys[0].dtype
        weights = self.kept[1] if self.kept else quantize_inputs(self.weights(dtype))
        dx = product(quantize_rows(*dys), weights, dtype)
        return lora_grad_input(dhs, lora_as, *dropout, dx=dx)


def quantize_outputs(weights: list[torch.Tensor]) -> list[Quantized]:
    """Each W [N, K] with a scale for each output: for x W^T, which sums over inputs."""
    return [quantize_rows(weight) for weight in weights]


def quantize_inputs(weights: list[torch.Tensor]) -> Quantized:
    """All W^T side by side, [K, sum of N], with a scale for each input: for the sum of dy W."""
    return quantize_rows(*[weight.t() for weight in weights])


def fp8_groups(keep: bool) -> Callable[[list[LoraLinear]], Fp8Group]:
    """What `fuse` takes to make its groups with."""
    return lambda linears: Fp8Group(linears, keep)
