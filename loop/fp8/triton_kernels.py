"""The Triton kernels behind products.py. All matrices are row-major.

In the kernels that go by blocks, `tokens`, `columns` and `dims` are the indices of a block: of a
row's tokens, of a layer's features and of LoRA's rank, as in kernels/triton_kernels.py.
"""

from __future__ import annotations

from ..kernels.triton_kernels import _load_block, _project_down, jit, triton

if triton:
    import triton.language as tl


# ---- quantize_rows: a row in one program, which holds it


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


# ---- quantize_rows beside a product with LoRA: rows are read twice, for the product and for codes


@jit
def _largest(largest, values):
    """The larger one of each number of a block, seen so far and in fp32, and |values|."""
    return tl.maximum(largest, tl.abs(values.to(tl.float32)))


@jit
def _scale_of(largest, scales, tokens, rows, largest_code, smallest_scale):
    """Writes and returns the scale of each token, from the largest numbers of its columns."""
    scale = tl.maximum(tl.max(largest, 1) / largest_code, smallest_scale)
    tl.store(scales + tokens, scale, mask=tokens < rows)
    return scale


@jit
def _write_codes(x, codes, tokens, rows, width, codes_width, scale, BLOCK_COLUMNS: tl.constexpr):
    """Writes the codes of these tokens of x [rows, width]; codes' rows are `codes_width` apart."""
    for start in range(0, width, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        in_bounds = (tokens < rows)[:, None] & (columns < width)[None]
        values = _load_block(x, tokens, rows, columns, width).to(tl.float32) / scale[:, None]
        pointers = codes + tokens[:, None] * codes_width + columns[None]
        tl.store(pointers, values.to(tl.float8e4nv), mask=in_bounds)


@jit
def quantize_with_lora_down_kernel(
    x,  # [rows, width]
    keep0,  # bool [rows, width], rows `keep_stride` apart
    keep1,
    keep2,
    a0,  # [rank, width]
    a1,
    a2,
    h0,  # [rows, rank], written: scale drop(x) A^T
    h1,
    h2,
    codes,  # E4M3 [rows, width], written
    scales,  # fp32 [rows], written
    rows,
    width,
    keep_stride,
    scale,
    largest_code,
    smallest_scale,
    NUM_LORAS: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_RANK)
    sum0 = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float32)
    sum1 = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float32)
    sum2 = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float32)
    largest = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        in_bounds = (tokens < rows)[:, None] & (columns < width)[None]
        keep_at = tokens[:, None] * keep_stride + columns[None]
        values = _load_block(x, tokens, rows, columns, width)
        largest = _largest(largest, values)
        sum0 += _project_down(values, keep0, keep_at, in_bounds, a0, columns, dims, width, rank)
        if NUM_LORAS > 1:
            sum1 += _project_down(values, keep1, keep_at, in_bounds, a1, columns, dims, width, rank)
        if NUM_LORAS > 2:
            sum2 += _project_down(values, keep2, keep_at, in_bounds, a2, columns, dims, width, rank)
    offsets = tokens[:, None] * rank + dims[None]
    in_bounds = (tokens < rows)[:, None] & (dims < rank)[None]
    tl.store(h0 + offsets, sum0 * scale, mask=in_bounds)
    if NUM_LORAS > 1:
        tl.store(h1 + offsets, sum1 * scale, mask=in_bounds)
    if NUM_LORAS > 2:
        tl.store(h2 + offsets, sum2 * scale, mask=in_bounds)
    row_scale = _scale_of(largest, scales, tokens, rows, largest_code, smallest_scale)
    _write_codes(x, codes, tokens, rows, width, width, row_scale, BLOCK_COLUMNS)


@jit
def _write_grad_h(
    dy,
    b,
    dh,
    tokens,
    rows,
    width,
    largest,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Writes dy B of these tokens; returns the largest numbers so far."""
    dims = tl.arange(0, BLOCK_RANK)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        values = _load_block(dy, tokens, rows, columns, width)
        largest = _largest(largest, values)
        b_block = _load_block(b, columns, width, dims, rank)
        total += tl.dot(values, b_block, input_precision="ieee")
    in_bounds = (tokens < rows)[:, None] & (dims < rank)[None]
    tl.store(dh + tokens[:, None] * rank + dims[None], total, mask=in_bounds)
    return largest


@jit
def quantize_with_grad_h_kernel(
    dy0,  # [rows, width0]
    dy1,  # [rows, width1]
    dy2,
    b0,  # [width0, rank]
    b1,
    b2,
    dh0,  # [rows, rank], written: dy B
    dh1,
    dh2,
    codes,  # E4M3 [rows, the sum of the widths], written
    scales,  # fp32 [rows], written
    rows,
    width0,
    width1,
    width2,
    largest_code,
    smallest_scale,
    NUM_PARTS: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    largest = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    largest = _write_grad_h(
        dy0, b0, dh0, tokens, rows, width0, largest, rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS
    )
    width = width0
    if NUM_PARTS > 1:
        largest = _write_grad_h(
            dy1, b1, dh1, tokens, rows, width1, largest,
            rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS,
        )  # fmt: skip
        width += width1
    if NUM_PARTS > 2:
        largest = _write_grad_h(
            dy2, b2, dh2, tokens, rows, width2, largest,
            rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS,
        )  # fmt: skip
        width += width2
    scale = _scale_of(largest, scales, tokens, rows, largest_code, smallest_scale)
    _write_codes(dy0, codes, tokens, rows, width0, width, scale, BLOCK_COLUMNS)
    if NUM_PARTS > 1:
        _write_codes(dy1, codes + width0, tokens, rows, width1, width, scale, BLOCK_COLUMNS)
    if NUM_PARTS > 2:
        codes += width0 + width1
        _write_codes(dy2, codes, tokens, rows, width2, width, scale, BLOCK_COLUMNS)
