"""Products with frozen weights in FP8: how rows are quantised, and what is multiplied.

A row x of activations, of gradients or of a weight is kept as codes in E4M3 (arXiv 2209.05433: 3
bits of mantissa, up to 448) and one scale in fp32: x = scale * codes, where the largest number of
the row gets the largest code. A product sums over rows, so both scales can be applied to its
result: y[t, n] = scale[t] * scale[n] * sum over k of codes[t, k] codes[n, k].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.lora_ops import on_triton, pad_to_three
from ..kernels.triton_kernels import triton
from .triton_kernels import quantize_rows_kernel

CODE = torch.float8_e4m3fn
LARGEST = torch.finfo(CODE).max  # 448
# Of a product of random numbers, relative to fp32. Each factor is rounded by up to 1/16: 0.026 of
# its norm, so some 0.037 are usual.
ERROR_BOUND = 5e-2
# Of a row of zeros. A smaller scale would not change the result, but 1 / scale could overflow.
SMALLEST_SCALE = 1e-30


class Quantized(NamedTuple):
    """Rows in FP8: x [rows, width] = scales * codes."""

    codes: torch.Tensor  # E4M3 [rows, width]
    scales: torch.Tensor  # fp32 [rows, 1]


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
    codes = torch.empty(rows, sum(widths), dtype=CODE, device=parts[0].device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=parts[0].device)
    padded_widths = pad_to_three(widths)
    blocks = [triton.next_power_of_2(width) for width in padded_widths]
    quantize_rows_kernel[(rows,)](
        *pad_to_three(parts),
        codes,
        scales,
        LARGEST,
        SMALLEST_SCALE,
        len(parts),
        *padded_widths,
        *blocks,
        num_warps=min(16, max(4, triton.next_power_of_2(sum(widths)) // 1024)),
    )
    return Quantized(codes, scales)


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
