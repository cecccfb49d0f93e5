"""The terms of fused.py, each one kernel: Triton's where there is a GPU, elsewhere the same in plain PyTorch, which is what they are tested against.

LoRA's dropout is given as (keeps, scale): for each LoRA a mask, bool [T, width], columns of one wider mask, or None for all where nothing is
dropped; and what is multiplied by all the same: LoRA's scaling over the share that is kept. Matrices are row-major.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA
    triton = None


def jit(kernel):
    # The number of rows changes from step to step: not to be compiled anew for each that divides by 16.
    return triton.jit(kernel, do_not_specialize=["rows", "share"]) if triton else kernel


@jit
def _drop(values, keep, at, inside):
    return tl.where(tl.load(keep + at, mask=inside, other=0) != 0, values, 0.0)


@jit
def _add_lora_down(values, keep, at, inside, a, k, r, width, rank):
    """drop(x) A^T of this block"""
    weights = tl.load(
        a + r[:, None] * width + k[None], mask=(r < rank)[:, None] & (k < width)[None], other=0.0
    )
    return tl.dot(_drop(values, keep, at, inside), tl.trans(weights), input_precision="ieee")


@jit
def lora_down_kernel(
    x,
    k0,
    k1,
    k2,
    a0,
    a1,
    a2,
    h0,
    h1,
    h2,
    rows,
    width,
    stride,
    scale,
    N: tl.constexpr,
    rank: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    t, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, R)
    s0, s1, s2 = (
        tl.zeros([T, R], tl.float32),
        tl.zeros([T, R], tl.float32),
        tl.zeros([T, R], tl.float32),
    )
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        inside, at = (t < rows)[:, None] & (k < width)[None], t[:, None] * stride + k[None]
        values = tl.load(x + t[:, None] * width + k[None], mask=inside, other=0.0)
        s0 += _add_lora_down(values, k0, at, inside, a0, k, r, width, rank)
        if N > 1:
            s1 += _add_lora_down(values, k1, at, inside, a1, k, r, width, rank)
        if N > 2:
            s2 += _add_lora_down(values, k2, at, inside, a2, k, r, width, rank)
    at, inside = t[:, None] * rank + r[None], (t < rows)[:, None] & (r < rank)[None]
    tl.store(h0 + at, s0 * scale, mask=inside)
    if N > 1:
        tl.store(h1 + at, s1 * scale, mask=inside)
    if N > 2:
        tl.store(h2 + at, s2 * scale, mask=inside)


@jit
def _add_outer_product(dh, values, keep, at, inside, t, r, rows, rank):
    """dh^T drop(x) of this block"""
    factors = tl.load(
        dh + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0
    )
    return tl.dot(tl.trans(factors), _drop(values, keep, at, inside), input_precision="ieee")


@jit
def grad_lora_a_kernel(
    d0,
    d1,
    d2,
    x,
    k0,
    k1,
    k2,
    out,
    rows,
    width,
    stride,
    share,
    scale,
    N: tl.constexpr,
    rank: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    k, r = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, R)
    first = tl.program_id(1).to(tl.int64) * share
    s0, s1, s2 = (
        tl.zeros([R, K], tl.float32),
        tl.zeros([R, K], tl.float32),
        tl.zeros([R, K], tl.float32),
    )
    for start in range(0, share, T):
        t = first + start + tl.arange(0, T)
        inside, at = (t < rows)[:, None] & (k < width)[None], t[:, None] * stride + k[None]
        values = tl.load(x + t[:, None] * width + k[None], mask=inside, other=0.0)
        s0 += _add_outer_product(d0, values, k0, at, inside, t, r, rows, rank)
        if N > 1:
            s1 += _add_outer_product(d1, values, k1, at, inside, t, r, rows, rank)
        if N > 2:
            s2 += _add_outer_product(d2, values, k2, at, inside, t, r, rows, rank)
    out += tl.program_id(1) * N * rank * width + r[:, None] * width + k[None]
    inside = (r < rank)[:, None] & (k < width)[None]
    tl.store(out, s0 * scale, mask=inside)
    if N > 1:
        tl.store(out + rank * width, s1 * scale, mask=inside)
    if N > 2:
        tl.store(out + 2 * rank * width, s2 * scale, mask=inside)


@jit
def _add_lora_up(dh, a, keep, at, inside, t, k, r, rows, width, rank):
    """drop(dh A) of this block"""
    factors = tl.load(
        dh + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0
    )
    weights = tl.load(
        a + r[:, None] * width + k[None], mask=(r < rank)[:, None] & (k < width)[None], other=0.0
    )
    return _drop(tl.dot(factors, weights, input_precision="ieee"), keep, at, inside)


@jit
def lora_grad_input_kernel(
    dx,
    d0,
    d1,
    d2,
    a0,
    a1,
    a2,
    k0,
    k1,
    k2,
    rows,
    width,
    stride,
    scale,
    N: tl.constexpr,
    rank: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    t, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, R)
    k = tl.program_id(1) * K + tl.arange(0, K)
    inside, at = (t < rows)[:, None] & (k < width)[None], t[:, None] * stride + k[None]
    sum = _add_lora_up(d0, a0, k0, at, inside, t, k, r, rows, width, rank)
    if N > 1:
        sum += _add_lora_up(d1, a1, k1, at, inside, t, k, r, rows, width, rank)
    if N > 2:
        sum += _add_lora_up(d2, a2, k2, at, inside, t, k, r, rows, width, rank)
    tl.store(dx + t[:, None] * width + k[None], sum * scale, mask=inside)


@jit
def _load_with_lora(
    y, h, b, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr
):
    """This block of y + h B^T in fp32, with the places of its numbers and which of them exist."""
    t, k, r = (
        tl.program_id(0).to(tl.int64) * T + tl.arange(0, T),
        tl.program_id(1) * K + tl.arange(0, K),
        tl.arange(0, R),
    )
    at, inside = t[:, None] * width + k[None], (t < rows)[:, None] & (k < width)[None]
    factors = tl.load(
        h + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0
    )
    weights = tl.load(
        b + k[:, None] * rank + r[None], mask=(k < width)[:, None] & (r < rank)[None], other=0.0
    )
    values = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    return values + tl.dot(factors, tl.trans(weights), input_precision="ieee"), at, inside


@jit
def swiglu_kernel(
    g,
    u,
    hg,
    bg,
    hu,
    bu,
    m,
    rows,
    width,
    rank: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    gate, at, inside = _load_with_lora(g, hg, bg, rows, width, rank, R, T, K)
    up, at, inside = _load_with_lora(u, hu, bu, rows, width, rank, R, T, K)
    tl.store(m + at, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def swiglu_backward_kernel(
    dm,
    g,
    u,
    hg,
    bg,
    hu,
    bu,
    dg,
    du,
    m,
    rows,
    width,
    rank: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    gate, at, inside = _load_with_lora(g, hg, bg, rows, width, rank, R, T, K)
    up, at, inside = _load_with_lora(u, hu, bu, rows, width, rank, R, T, K)
    grad = tl.load(dm + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(dg + at, grad * up * share * (1 + gate * (1 - share)), mask=inside)
    tl.store(du + at, grad * gate * share, mask=inside)
    tl.store(m + at, gate * share * up, mask=inside)


@jit
def rotate_kernel(x, cos, sin, out, heads, half, H: tl.constexpr, D: tl.constexpr):
    t, h, d = tl.program_id(0).to(tl.int64), tl.arange(0, H), tl.arange(0, D)
    inside = (h < heads)[:, None] & (d < half)[None]
    at = t * heads * 2 * half + h[:, None] * 2 * half + d[None]
    one, two = (
        tl.load(x + at, mask=inside, other=0.0).to(tl.float32),
        tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32),
    )
    angle = t * 2 * half + d  # both halves of a head turn by the same angles
    c, s = (
        tl.load(cos + angle, mask=d < half, other=0.0).to(tl.float32)[None],
        tl.load(sin + angle, mask=d < half, other=0.0).to(tl.float32)[None],
    )
    tl.store(out + at, one * c - two * s, mask=inside)
    tl.store(out + at + half, two * c + one * s, mask=inside)
