"""LoRA's dropout with masks that belong to examples.

So neither ranks nor micro-batches change what a step computes. torch's dropout draws from the
rank's generator: on another number of ranks an example would get another mask. Here each document
of a row gets random bits from a generator seeded with (seed, step, example), drawn once for all
LoRA modules: module m reads them from column 16 m on. Two modules' masks at the same feature are
independent draws; one mask is a shifted copy of the other. That needs one mask of a row in memory
and a hundredth of the random numbers: torch keeps one for each of the 154 modules of TinyLlama.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn

COLUMN_STEP = 16  # columns between two modules: bytes that a kernel can read at a time


def apply_dropout_mask(x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
    """x * keep * scale, by the kernel of dropout's own backward pass. keep: bool, x's shape.

    On a CPU that kernel takes several times as long as these products, which give the same bits.
    """
    if x.device.type == "cpu":
        return (x * keep.view(torch.uint8).to(x.dtype)).mul_(scale)
    return torch.ops.aten.native_dropout_backward(x, keep, scale)


class _ApplyMask(torch.autograd.Function):
    """`apply_dropout_mask` of x [1, T, F] and keep bool [T, F].

    keep is a view of the row's one mask, so nothing is saved for it.
    """

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.keep = keep
        ctx.scale = scale
        return apply_dropout_mask(x, keep, scale)

    @staticmethod
    def backward(ctx, grad):
        return apply_dropout_mask(grad, ctx.keep, ctx.scale), None, None


class PerExampleDropout(nn.Module):
    """Replaces one LoRA module's nn.Dropout. A layer that is recomputed meets the same mask.

    masks: shared by all LoRA modules; column: of the mask, where this module's begins.
    """

    def __init__(self, masks: "DropoutMasks", column: int) -> None:
        super().__init__()
        self.masks = masks
        self.column = column

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, F] -> [1, T, F]."""
        if not self.training:
            return x
        keep, scale = self.mask(x.shape[-1])
        return _ApplyMask.apply(x, keep.expand(x.shape), scale)

    def mask(self, width: int) -> tuple[torch.Tensor, float]:
        """(keep bool [T, width], the factor of the numbers that are kept)."""
        keep = self.masks.keep[:, self.column : self.column + width]
        return keep, 1 / (1 - self.masks.p)


class DropoutMasks:
    """The dropout mask of the current micro-batch, for all LoRA modules together.

    `keep`, bool [T, width], is true where a number is kept; it exists from the first draw on.
    `width` is 0 in a model without LoRA dropout, else that of `mask_width`.
    """

    keep: torch.Tensor

    def __init__(self, p: float, seed: int, device) -> None:
        self.p = p
        self.seed = seed
        self.device = device
        self.width = 0
        self.generator = torch.Generator(device)
        self.buffer = torch.empty(0, 0, dtype=torch.bool, device=device)  # [most tokens, width]

    def reserve(self, tokens: int) -> None:
        """Allocates the mask [tokens, width]; rows of up to `tokens` share its address from now on.

        A later row of more tokens allocates a larger one.
        """
        self.buffer = torch.ones(tokens, self.width, dtype=torch.bool, device=self.device)
        self.keep = self.buffer

    def draw(self, step: int, examples: Sequence[int], cu_seqlens: torch.Tensor) -> None:
        """Draws the mask of a row, in place. Without LoRA dropout nothing is drawn.

        The same arguments give the same bits on the same kind of device.
        examples: the numbers of the row's examples, in order; cu_seqlens: int [documents + 1] on
        the CPU, where there may be more documents than examples, which padding adds.
        """
        if not self.width:
            return
        bounds = cu_seqlens.tolist()
        tokens = bounds[-1]
        if len(self.buffer) < tokens:
            self.reserve(tokens)
        self.keep = self.buffer[:tokens]
        for example, start, end in zip(examples, bounds, bounds[1:]):
            sequence = np.random.SeedSequence([self.seed, step, example])
            (state,) = sequence.generate_state(1, np.uint64)
            self.generator.manual_seed(int(state) >> 1)  # it takes a signed 64-bit number
            self.keep[start:end].bernoulli_(1 - self.p, generator=self.generator)


def mask_width(widths: Sequence[int]) -> int:
    """The columns of a row's mask for LoRA modules with inputs of these widths."""
    widest = -(-max(widths) // COLUMN_STEP) * COLUMN_STEP
    return widest + COLUMN_STEP * len(widths)


def install_dropout(model: nn.Module, p: float, seed: int, device) -> DropoutMasks:
    """Replaces each nn.Dropout of the model's LoRA modules by PerExampleDropout.

    With p = 0 there is none. Returns the masks, which have to be drawn for each micro-batch.
    """
    masks = DropoutMasks(p, seed, device)
    loras: list[Any] = []
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {}).values()
        if any(isinstance(dropout, nn.Dropout) for dropout in dropouts):
            loras.append(module)
    for number, module in enumerate(loras):
        dropout = PerExampleDropout(masks, COLUMN_STEP * number)
        module.lora_dropout = nn.ModuleDict(dict.fromkeys(module.lora_dropout, dropout))
    if loras:
        masks.width = mask_width([module.in_features for module in loras])
    return masks
