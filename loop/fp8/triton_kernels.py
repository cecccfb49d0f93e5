"""The Triton kernel behind products.py. All matrices are row-major."""

from __future__ import annotations

from ..kernels.triton_kernels import jit, triton

if triton:
    import triton.language as tl


@jit
def _load_part(part, token, width: tl.constexpr, BLOCK: tl.constexpr):
    """A token's row of one part in fp32, 0 behind its end."""
    columns = tl.arange(0, BLOCK)
    return tl.load(part + token * width + columns, mask=columns < width, other=0.0).to(tl.float32)


@jit
def _store_codes(codes, values, scale, width: tl.constexpr, BLOCK: tl.constexpr):
    """Writes values / scale, rounded to the nearest code."""
    columns = tl.arange(0, BLOCK)
    tl.store(codes + columns, (values / scale).to(tl.float8e4nv), mask=columns < width)


@jit
def quantize_rows_kernel(
    part0,  # [tokens, width0], one program a token
    part1,  # [tokens, width1]
    part2,
    codes,  # E4M3 [tokens, the sum of the widths], written
    scales,  # fp32 [tokens], written
    largest,  # the largest number that a code stands for
    smallest_scale,
    NUM_PARTS: tl.constexpr,
    width0: tl.constexpr,
    width1: tl.constexpr,
    width2: tl.constexpr,
    BLOCK0: tl.constexpr,
    BLOCK1: tl.constexpr,
    BLOCK2: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    values0 = _load_part(part0, token, width0, BLOCK0)
    amax = tl.max(tl.abs(values0), 0)
    width = width0
    if NUM_PARTS > 1:
        values1 = _load_part(part1, token, width1, BLOCK1)
        amax = tl.maximum(amax, tl.max(tl.abs(values1), 0))
        width += width1
    if NUM_PARTS > 2:
        values2 = _load_part(part2, token, width2, BLOCK2)
        amax = tl.maximum(amax, tl.max(tl.abs(values2), 0))
        width += width2
    scale = tl.maximum(amax / largest, smallest_scale)
    tl.store(scales + token, scale)
    codes += token * width
    _store_codes(codes, values0, scale, width0, BLOCK0)
    if NUM_PARTS > 1:
        _store_codes(codes + width0, values1, scale, width1, BLOCK1)
    if NUM_PARTS > 2:
        _store_codes(codes + width0 + width1, values2, scale, width2, BLOCK2)
