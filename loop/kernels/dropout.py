"""LoRA's dropout with a mask that belongs to the example, so that neither ranks nor micro-batches change what a step computes.

torch's own draws from the rank's generator: on another number of ranks an example would meet another mask. Here each document of a row gets
random bits from a generator seeded with (seed, step, example), drawn once for all LoRA modules: module m reads them from column 16 m on. So
two modules' masks at the same feature are independent draws, and one is a shifted copy of the other. That needs one mask of a row in
memory and a hundredth of the random numbers, where torch draws and keeps one for each of the 154 modules of TinyLlama.
"""

from typing import Any

import numpy as np
import torch
import torch.nn as nn

APART = 16  # columns between two modules: bytes that a kernel can read at a time


class _Masked(torch.autograd.Function):
    """x * keep * scale in one kernel, which is the one of dropout's own backward pass. x [1, T, F], keep bool [T, F]."""

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.keep, ctx.scale = keep, scale  # a view of the row's one mask: nothing is kept for it
        return torch.ops.aten.native_dropout_backward(x, keep, scale)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.native_dropout_backward(grad, ctx.keep, ctx.scale), None, None


class PerExampleDropout(nn.Module):
    """In the place of one LoRA module's nn.Dropout; `masks` is shared by all. Recomputing a checkpointed layer meets the same mask."""

    def __init__(self, masks: "DropoutMasks", column: int) -> None:
        super().__init__()
        self.masks, self.column = masks, column

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep, scale = self.mask(x.shape[-1])
        return _Masked.apply(x, keep.expand(x.shape), scale)

    def mask(self, width: int) -> tuple[torch.Tensor, float]:
        """(keep bool [T, width], what a kept number is multiplied by)"""
        return self.masks.keep[:, self.column : self.column + width], 1 / (1 - self.masks.p)


class DropoutMasks:
    """The mask of the micro-batch that is being computed: `keep` bool [T, widest module + 16 for each module]."""

    def __init__(self, p: float, seed: int, device) -> None:
        self.p, self.seed, self.device, self.width = p, seed, device, 0
        self.generator = torch.Generator(device)
        self.place = torch.empty(0, 0, dtype=torch.bool, device=device)

    def reserve(self, tokens: int) -> None:
        """Rows of up to so many tokens have their mask at one address from now on."""
        self.place = torch.ones(tokens, self.width, dtype=torch.bool, device=self.device)
        self.keep = self.place

    def draw(self, step: int, examples: list[int], cu_seqlens: torch.Tensor) -> None:
        """examples: their numbers, in the order of the row; cu_seqlens: on the CPU. The same arguments give the same bits on the same
        kind of device. Without LoRA dropout nothing is drawn."""
        if not self.width:
            return
        bounds = cu_seqlens.tolist()
        if len(self.place) < bounds[-1]:
            self.reserve(bounds[-1])
        self.keep = self.place[: bounds[-1]]
        for example, start, end in zip(examples, bounds, bounds[1:]):
            mixed = np.random.SeedSequence([self.seed, step, example]).generate_state(1, np.uint64)[
                0
            ]
            self.generator.manual_seed(int(mixed) >> 1)  # a signed 64-bit number
            self.keep[start:end].bernoulli_(1 - self.p, generator=self.generator)


def install_dropout(model: nn.Module, p: float, seed: int, device) -> DropoutMasks:
    """Puts ExampleDropout in the place of each nn.Dropout of the model's LoRA modules (of which there is none with p = 0)."""
    masks = DropoutMasks(p, seed, device)
    lora: list[Any] = [
        m
        for m in model.modules()
        if any(isinstance(d, nn.Dropout) for d in getattr(m, "lora_dropout", {}).values())
    ]
    for number, module in enumerate(lora):
        module.lora_dropout = nn.ModuleDict(
            dict.fromkeys(module.lora_dropout, PerExampleDropout(masks, APART * number))
        )
        masks.width = max(masks.width, -(-module.in_features // APART) * APART + APART * len(lora))
    return masks
