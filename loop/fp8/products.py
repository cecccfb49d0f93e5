"""Products with frozen weights in FP8: how rows are quantised, and what is multiplied.

A row x of activations, of gradients or of a weight is kept as codes in E4M3 (arXiv 2209.05433: 3
bits of mantissa, up to 448) and one scale in fp32: x = scale * codes, where the largest number of
the row gets the largest code. A product sums over rows, so both scales can be applied to its
result: y[t, n] = scale[t] * scale[n] * sum over k of codes[t, k] codes[n, k].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.lora_ops import (
    block_sizes,
    lora_down,
    needs_separate_kernels,
    on_triton,
    pad_to_three,
)
from ..kernels.triton_kernels import triton
from .triton_kernels import (
    quantize_rows_kernel,
    quantize_with_grad_h_kernel,
    quantize_with_lora_down_kernel,
)

CODE = torch.float8_e4m3fn
LARGEST = torch.finfo(CODE).max  # 448
# Of a product of random numbers, relative to fp32. Each factor is rounded by up to 1/16: 0.026 of
# its norm, so some 0.037 are usual.
ERROR_BOUND = 5e-2
# Of a row of zeros. A smaller scale would not change the result, but 1 / scale could overflow.
SMALLEST_SCALE = 1e-30
ONE_KERNEL = True  # quantise rows in the kernel that multiplies them by a LoRA
MOST_RANK = 64


class Quantized(NamedTuple):
    """Rows in FP8: x [rows, width] = scales * codes."""

    codes: torch.Tensor  # E4M3 [rows, width]
    scales: torch.Tensor  # fp32 [rows, 1]


def empty_rows(rows: int, width: int, device) -> Quantized:
    return Quantized(
        torch.empty(rows, width, dtype=CODE, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


def quantize_rows(*parts: torch.Tensor) -> Quantized:
    """The rows [T, sum of widths] of up to three matrices [T, width] side by side, in FP8.

    The kernel reads each number once, and writes the codes alone.
    """
    if not on_triton(parts[0]):
        x = torch.cat([part.float() for part in parts], dim=1)  # a copy
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
        scales = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
        return Quantized(x.div_(scales).to(CODE), scales)
    parts = tuple(part.contiguous() for part in parts)
    widths = [part.shape[1] for part in parts]
    rows = len(parts[0])
    out = empty_rows(rows, sum(widths), parts[0].device)
    padded_widths = pad_to_three(widths)
    blocks = [triton.next_power_of_2(width) for width in padded_widths]
    quantize_rows_kernel[(rows,)](
        *pad_to_three(parts),
        *out,
        LARGEST,
        SMALLEST_SCALE,
        len(parts),
        *padded_widths,
        *blocks,
        num_warps=min(16, max(4, triton.next_power_of_2(sum(widths)) // 1024)),
    )
    return out


def multiplies_while_quantizing(x: torch.Tensor, rank: int) -> bool:
    """Whether one kernel quantises x and multiplies it by a LoRA; above the rank it would spill."""
    return on_triton(x) and rank <= MOST_RANK and ONE_KERNEL


def quantize_with_lora_down(
    x: torch.Tensor, lora_as, keep_masks, scale: float
) -> tuple[Quantized, tuple[torch.Tensor, ...]]:
    """(the rows of x [T, width] in FP8, what `lora_down` returns for the same arguments)."""
    rank = len(lora_as[0])
    separate = keep_masks is None or needs_separate_kernels(lora_as, x.dtype, rank)
    if separate or not multiplies_while_quantizing(x, rank):
        return quantize_rows(x), lora_down(x, lora_as, keep_masks, scale)
    rows, width = x.shape
    out = empty_rows(rows, width, x.device)
    hs = x.new_empty(len(lora_as), rows, rank).unbind()
    sizes = block_sizes(rank, x.dtype)
    quantize_with_lora_down_kernel[(triton.cdiv(rows, sizes.tokens),)](
        x,
        *pad_to_three(keep_masks),
        *pad_to_three(lora_as),
        *pad_to_three(hs),
        *out,
        rows,
        width,
        keep_masks[0].stride(0),
        scale,
        LARGEST,
        SMALLEST_SCALE,
        len(lora_as),
        *sizes,
    )
    return out, hs


def quantize_with_grad_h(dys, lora_bs) -> tuple[Quantized, tuple[torch.Tensor, ...]]:
    """(the rows of up to three dy [T, N] side by side in FP8, dh = dy B [T, r] of each)."""
    rank = lora_bs[0].shape[1]
    if not multiplies_while_quantizing(dys[0], rank):
        return quantize_rows(*dys), tuple(dy @ b for dy, b in zip(dys, lora_bs))
    dys = tuple(dy.contiguous() for dy in dys)
    widths = [dy.shape[1] for dy in dys]
    rows = len(dys[0])
    out = empty_rows(rows, sum(widths), dys[0].device)
    dhs = dys[0].new_empty(len(dys), rows, rank).unbind()
    sizes = block_sizes(rank, dys[0].dtype)
    quantize_with_grad_h_kernel[(triton.cdiv(rows, sizes.tokens),)](
        *pad_to_three(dys),
        *pad_to_three(lora_bs),
        *pad_to_three(dhs),
        *out,
        rows,
        *pad_to_three(widths),
        LARGEST,
        SMALLEST_SCALE,
        len(dys),
        *sizes,
    )
    return out, dhs


def product(x: Quantized, weight: Quantized, dtype: torch.dtype, bias=None) -> torch.Tensor:
    """x w^T + bias [T, N] in dtype, from x [T, K] and w [N, K]. K and N divide by 16."""
    return torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scales,
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
