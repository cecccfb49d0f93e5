"""The Triton kernels behind lora_ops.py, section by section in the same order.

`lora_ops` holds the plain PyTorch version of each and launches it. All matrices are row-major.
In every kernel `tokens`, `columns` and `dims` are the indices of a block: of the row's tokens, of a
layer's features and of LoRA's rank. What lies outside of a matrix is read as 0 and not written.
Kernels for up to three LoRAs of one input take three pointers of each kind and read NUM_LORAS.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA
    triton = None


def jit(kernel):
    """triton.jit, or the function itself without Triton."""
    if not triton:
        return kernel
    # The number of tokens changes from step to step. Specialising on it would compile a second
    # kernel for each number that divides by 16.
    return triton.jit(
        kernel, do_not_specialize=["rows", "rows_per_partial", "num_partials", "size"]
    )


# ---- blocks


@jit
def _load_block(matrix, row_indices, num_rows, column_indices, num_columns):
    """The block of a contiguous matrix [num_rows, num_columns] at these rows and columns."""
    in_bounds = (row_indices < num_rows)[:, None] & (column_indices < num_columns)[None]
    # Added from left to right, so that a loop over columns computes the rows' addresses once.
    pointers = matrix + row_indices[:, None] * num_columns + column_indices[None]
    return tl.load(pointers, mask=in_bounds, other=0.0)


@jit
def _drop(values, keep, keep_offsets, in_bounds):
    """`values` where the dropout mask is true, elsewhere 0. The scale is applied by the caller."""
    return tl.where(tl.load(keep + keep_offsets, mask=in_bounds, other=0) != 0, values, 0.0)


# ---- lora_down: h = scale drop(x) A^T


@jit
def _project_down(values, keep, keep_offsets, in_bounds, a, columns, dims, width, rank):
    """drop(x) A^T of this block, where `values` is x."""
    a_block = _load_block(a, dims, rank, columns, width)
    dropped = _drop(values, keep, keep_offsets, in_bounds)
    return tl.dot(dropped, tl.trans(a_block), input_precision="ieee")


@jit
def lora_down_kernel(
    x,  # [rows, width]
    keep0,  # bool [rows, width], rows `keep_stride` apart
    keep1,
    keep2,
    a0,  # [rank, width]
    a1,
    a2,
    h0,  # [rows, rank], written
    h1,
    h2,
    rows,
    width,
    keep_stride,
    scale,
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
    for start in range(0, width, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        in_bounds = (tokens < rows)[:, None] & (columns < width)[None]
        keep_at = tokens[:, None] * keep_stride + columns[None]
        values = _load_block(x, tokens, rows, columns, width)
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


# ---- grad_lora_a: dA = scale dh^T drop(x)


@jit
def _outer_product(dh, values, keep, keep_offsets, in_bounds, tokens, dims, rows, rank):
    """dh^T drop(x) of this block, where `values` is x."""
    dh_block = _load_block(dh, tokens, rows, dims, rank)
    dropped = _drop(values, keep, keep_offsets, in_bounds)
    return tl.dot(tl.trans(dh_block), dropped, input_precision="ieee")


@jit
def grad_lora_a_kernel(
    dh0,  # [rows, rank]
    dh1,
    dh2,
    x,  # [rows, width]
    keep0,  # bool [rows, width], rows `keep_stride` apart
    keep1,
    keep2,
    partials,  # fp32 [partial sums, NUM_LORAS, rank, width], written
    rows,
    width,
    keep_stride,
    rows_per_partial,
    scale,
    NUM_LORAS: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dims = tl.arange(0, BLOCK_RANK)
    first = tl.program_id(1).to(tl.int64) * rows_per_partial
    sum0 = tl.zeros([BLOCK_RANK, BLOCK_COLUMNS], tl.float32)
    sum1 = tl.zeros([BLOCK_RANK, BLOCK_COLUMNS], tl.float32)
    sum2 = tl.zeros([BLOCK_RANK, BLOCK_COLUMNS], tl.float32)
    for start in range(0, rows_per_partial, BLOCK_TOKENS):
        tokens = first + start + tl.arange(0, BLOCK_TOKENS)
        in_bounds = (tokens < rows)[:, None] & (columns < width)[None]
        keep_at = tokens[:, None] * keep_stride + columns[None]
        values = _load_block(x, tokens, rows, columns, width)
        sum0 += _outer_product(dh0, values, keep0, keep_at, in_bounds, tokens, dims, rows, rank)
        if NUM_LORAS > 1:
            sum1 += _outer_product(dh1, values, keep1, keep_at, in_bounds, tokens, dims, rows, rank)
        if NUM_LORAS > 2:
            sum2 += _outer_product(dh2, values, keep2, keep_at, in_bounds, tokens, dims, rows, rank)
    begin = tl.program_id(1) * NUM_LORAS * rank * width  # of this program's partial sum
    partials += begin + dims[:, None] * width + columns[None]
    in_bounds = (dims < rank)[:, None] & (columns < width)[None]
    tl.store(partials, sum0 * scale, mask=in_bounds)
    if NUM_LORAS > 1:
        tl.store(partials + rank * width, sum1 * scale, mask=in_bounds)
    if NUM_LORAS > 2:
        tl.store(partials + 2 * rank * width, sum2 * scale, mask=in_bounds)


# ---- grad_lora_b: dh = dy B and dB = dy^T h


@jit
def grad_lora_b_kernel(
    dy,  # [rows, width]
    h,  # [rows, rank]
    b,  # [width, rank]
    dh_partials,  # fp32 [blocks of columns, rows, rank], written
    db_partials,  # fp32 [partial sums, width, rank], written
    rows,
    width,
    rows_per_partial,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dims = tl.arange(0, BLOCK_RANK)
    first = tl.program_id(1).to(tl.int64) * rows_per_partial
    b_block = _load_block(b, columns, width, dims, rank)
    db = tl.zeros([BLOCK_COLUMNS, BLOCK_RANK], tl.float32)
    dh_partials += tl.program_id(0).to(tl.int64) * rows * rank
    for start in range(0, rows_per_partial, BLOCK_TOKENS):
        tokens = first + start + tl.arange(0, BLOCK_TOKENS)
        values = _load_block(dy, tokens, rows, columns, width)
        h_block = _load_block(h, tokens, rows, dims, rank)
        db += tl.dot(tl.trans(values), h_block, input_precision="ieee")
        dh = tl.dot(values, b_block, input_precision="ieee")
        in_bounds = (tokens < rows)[:, None] & (dims < rank)[None]
        tl.store(dh_partials + tokens[:, None] * rank + dims[None], dh, mask=in_bounds)
    db_partials += tl.program_id(1).to(tl.int64) * width * rank
    in_bounds = (columns < width)[:, None] & (dims < rank)[None]
    tl.store(db_partials + columns[:, None] * rank + dims[None], db, mask=in_bounds)


@jit
def grad_lora_b_sum(
    partials,  # fp32 [num_partials, size]
    out,  # [size], written
    num_partials,
    size,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    partial = tl.arange(0, BLOCK_PARTIALS)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = (partial < num_partials)[:, None] & (index < size)[None]
    pointers = partials + partial[:, None].to(tl.int64) * size + index[None]
    total = tl.sum(tl.load(pointers, mask=in_bounds, other=0.0), 0)
    tl.store(out + index, total, mask=index < size)


# ---- lora_up: y += h B^T


@jit
def _load_with_lora(
    y,
    h,
    b,
    rows,
    width,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """(this block of y + h B^T in fp32, the offsets of its elements, which of them exist)."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dims = tl.arange(0, BLOCK_RANK)
    offsets = tokens[:, None] * width + columns[None]
    in_bounds = (tokens < rows)[:, None] & (columns < width)[None]
    h_block = _load_block(h, tokens, rows, dims, rank)
    b_block = _load_block(b, columns, width, dims, rank)
    values = tl.load(y + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    values += tl.dot(h_block, tl.trans(b_block), input_precision="ieee")
    return values, offsets, in_bounds


@jit
def lora_up_kernel(
    y,  # [rows, width], added to
    h,  # [rows, rank]
    b,  # [width, rank]
    rows,
    width,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    values, offsets, in_bounds = _load_with_lora(
        y, h, b, rows, width, rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS
    )
    tl.store(y + offsets, values, mask=in_bounds)


# ---- lora_grad_input: dx (+)= sum of scale drop(dh A)


@jit
def _project_up(dh, a, keep, keep_offsets, in_bounds, tokens, columns, dims, rows, width, rank):
    """drop(dh A) of this block."""
    dh_block = _load_block(dh, tokens, rows, dims, rank)
    a_block = _load_block(a, dims, rank, columns, width)
    product = tl.dot(dh_block, a_block, input_precision="ieee")
    return _drop(product, keep, keep_offsets, in_bounds)


@jit
def lora_grad_input_kernel(
    dx,  # [rows, width], written, or added to
    dh0,  # [rows, rank]
    dh1,
    dh2,
    a0,  # [rank, width]
    a1,
    a2,
    keep0,  # bool [rows, width], rows `keep_stride` apart
    keep1,
    keep2,
    rows,
    width,
    keep_stride,
    scale,
    NUM_LORAS: tl.constexpr,
    ADDS: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dims = tl.arange(0, BLOCK_RANK)
    in_bounds = (tokens < rows)[:, None] & (columns < width)[None]
    keep_at = tokens[:, None] * keep_stride + columns[None]
    total = _project_up(
        dh0, a0, keep0, keep_at, in_bounds, tokens, columns, dims, rows, width, rank
    )
    if NUM_LORAS > 1:
        total += _project_up(
            dh1, a1, keep1, keep_at, in_bounds, tokens, columns, dims, rows, width, rank
        )
    if NUM_LORAS > 2:
        total += _project_up(
            dh2, a2, keep2, keep_at, in_bounds, tokens, columns, dims, rows, width, rank
        )
    pointers = dx + tokens[:, None] * width + columns[None]
    total *= scale
    if ADDS:
        total += tl.load(pointers, mask=in_bounds, other=0.0)
    tl.store(pointers, total, mask=in_bounds)


# ---- swiglu and swiglu_backward: silu(gate') up', where gate' and up' have their LoRA added


@jit
def swiglu_kernel(
    gate,  # [rows, width], without its LoRA
    up,
    gate_h,  # [rows, rank]
    gate_b,  # [width, rank]
    up_h,
    up_b,
    out,  # [rows, width], written
    rows,
    width,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    g, offsets, in_bounds = _load_with_lora(
        gate, gate_h, gate_b, rows, width, rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS
    )
    u, offsets, in_bounds = _load_with_lora(
        up, up_h, up_b, rows, width, rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS
    )
    tl.store(out + offsets, g * tl.sigmoid(g) * u, mask=in_bounds)


@jit
def swiglu_backward_kernel(
    d_out,  # [rows, width], the gradient of silu(gate') up'
    gate,  # [rows, width], without its LoRA
    up,
    gate_h,  # [rows, rank]
    gate_b,  # [width, rank]
    up_h,
    up_b,
    d_gate,  # [rows, width], written
    d_up,  # [rows, width], written
    out,  # [rows, width], written: silu(gate') up' again
    rows,
    width,
    rank: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    g, offsets, in_bounds = _load_with_lora(
        gate, gate_h, gate_b, rows, width, rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS
    )
    u, offsets, in_bounds = _load_with_lora(
        up, up_h, up_b, rows, width, rank, BLOCK_RANK, BLOCK_TOKENS, BLOCK_COLUMNS
    )
    grad = tl.load(d_out + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    tl.store(d_gate + offsets, grad * u * sigmoid * (1 + g * (1 - sigmoid)), mask=in_bounds)
    tl.store(d_up + offsets, grad * g * sigmoid, mask=in_bounds)
    tl.store(out + offsets, g * sigmoid * u, mask=in_bounds)


# ---- rotate: rotary positions


@jit
def rotate_kernel(
    x,  # [tokens, heads, 2 half], one program a token
    cos,  # [tokens, 2 half]
    sin,
    out,  # [tokens, heads, 2 half], written
    heads,
    half,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    in_bounds = (head < heads)[:, None] & (dim < half)[None]
    offsets = token * heads * 2 * half + head[:, None] * 2 * half + dim[None]
    x1 = tl.load(x + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    x2 = tl.load(x + offsets + half, mask=in_bounds, other=0.0).to(tl.float32)
    angle = token * 2 * half + dim  # both halves of a head turn by the same angles
    c = tl.load(cos + angle, mask=dim < half, other=0.0).to(tl.float32)[None]
    s = tl.load(sin + angle, mask=dim < half, other=0.0).to(tl.float32)[None]
    tl.store(out + offsets, x1 * c - x2 * s, mask=in_bounds)
    tl.store(out + offsets + half, x2 * c + x1 * s, mask=in_bounds)
