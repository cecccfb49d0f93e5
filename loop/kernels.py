"""The terms of fused.py, each one kernel: Triton's where there is a GPU, elsewhere the same in plain PyTorch, which is what they are tested against.

LoRA's dropout is given as (keeps, scale): for each LoRA a mask, bool [T, width], columns of one wider mask, or None for all where nothing is
dropped; and what is multiplied by all the same: LoRA's scaling over the share that is kept. Matrices are row-major.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA
    triton = None

masked = torch.ops.aten.native_dropout_backward  # x * keep * scale in one kernel


def jit(kernel):
    # The number of rows changes from step to step: not to be compiled anew for each that divides by 16.
    return triton.jit(kernel, do_not_specialize=["rows", "share"]) if triton else kernel


TOKENS = 32  # of a block: the fastest of 16, 32, 64 and 128 for each kernel, on an H200


def blocks(rank: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rank, the rank's block, tokens of a block, columns of a block)"""
    padded = max(16, triton.next_power_of_2(rank))
    return rank, padded, TOKENS, 128 if padded <= 64 and dtype != torch.float32 else 64


def apart(tensors, dtype: torch.dtype, rank: int, most: int = 32) -> bool:
    """Whether LoRAs of one input take a kernel each: above rank 32 (16 in fp32) three of them spill registers, and need more shared memory
    than smaller cards have."""
    return len(tensors) > 1 and rank > (most if dtype != torch.float32 else most // 2)


def on_triton(x: torch.Tensor) -> bool:
    """Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on a CPU, for tests."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def down(x: torch.Tensor, a_s, keeps, scale: float) -> tuple[torch.Tensor, ...]:
    """h = scale drop(x) A^T [T, r] for each of up to three LoRAs of one input. On a GPU it is read once, and no drop(x) is written."""
    if keeps is None:
        return tuple((x @ a.t()).mul_(scale) for a in a_s)
    if not on_triton(x):
        return tuple(masked(x, keep, scale) @ a.t() for a, keep in zip(a_s, keeps))
    (rows, width), rank = x.shape, len(a_s[0])
    if apart(a_s, x.dtype, rank):
        return tuple(h for a, keep in zip(a_s, keeps) for h in down(x, (a,), (keep,), scale))
    hs = x.new_empty(len(a_s), rows, rank).unbind()
    _down[(triton.cdiv(rows, TOKENS),)](x, *three(keeps), *three(a_s), *three(hs), rows, width, keeps[0].stride(0), scale, len(a_s),
                                        *blocks(rank, x.dtype))  # fmt: skip
    return hs


def grad_down(dhs, x: torch.Tensor, keeps, scale: float) -> tuple[torch.Tensor, ...]:
    """dA = scale dh^T drop(x) [r, K] for each. The sum over T is cut into shares that are added in a fixed order: the same bits in every run."""
    if keeps is None:
        return tuple((dh.t() @ x).mul_(scale) for dh in dhs)
    if not on_triton(x):
        return tuple(dh.t() @ masked(x, keep, scale) for dh, keep in zip(dhs, keeps))
    (rows, width), rank = x.shape, dhs[0].shape[1]
    if apart(dhs, x.dtype, rank):
        return tuple(da for dh, keep in zip(dhs, keeps) for da in grad_down((dh,), x, (keep,), scale))
    sizes = blocks(rank, x.dtype)
    shares = torch.empty(max(1, min(32, rows // 512)), len(dhs), rank, width, device=x.device)
    grid, share = (triton.cdiv(width, sizes[3]), len(shares)), triton.cdiv(triton.cdiv(rows, len(shares)), TOKENS) * TOKENS
    _grad_down[grid](*three(dhs), x, *three(keeps), shares, rows, width, keeps[0].stride(0), share, scale, len(dhs), *sizes)
    return shares.sum(0).to(x.dtype).unbind()


def up(dhs, a_s, keeps, scale: float) -> torch.Tensor:
    """dx [T, K], the sum of scale drop(dh A)."""
    if keeps is None:
        dx = dhs[0] @ (a_s[0] * scale)
        for dh, a in zip(dhs[1:], a_s[1:]):
            dx.addmm_(dh, a, alpha=scale)
        return dx
    (rows, rank), width = dhs[0].shape, a_s[0].shape[1]
    if not on_triton(dhs[0]) or apart(dhs, dhs[0].dtype, rank, most=128):
        parts = zip(dhs, a_s, keeps)
        return functools.reduce(torch.Tensor.add_, (masked(dh @ a, keep, scale) for dh, a, keep in parts))
    dx, sizes = dhs[0].new_empty(rows, width), blocks(rank, dhs[0].dtype)
    grid = triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3])
    _up[grid](dx, *three(dhs), *three(a_s), *three(keeps), rows, width, keeps[0].stride(0), scale, len(dhs), *sizes)
    return dx


def three(tensors) -> tuple:
    """What a kernel that takes up to three is called with; what it has no use for is not read."""
    return *tensors, *(tensors[-1],) * (3 - len(tensors))


def lift(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + h B^T. y [T, N], h [T, r], b [N, r]"""
    return torch.addmm(y, h, b.t())


def swiglu(g: torch.Tensor, u: torch.Tensor, up_g: tuple, up_u: tuple) -> torch.Tensor:
    """silu(g') u', where g' and u' are g and u with their LoRA's (h, b) lifted onto them, without writing them down on a GPU."""
    if not on_triton(g):
        return F.silu(lift(g, *up_g)) * lift(u, *up_u)
    m, (rows, width), sizes = torch.empty_like(g), g.shape, blocks(up_g[0].shape[1], g.dtype)
    _swiglu[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3]))](g, u, *up_g, *up_u, m, rows, width, *sizes)
    return m


def swiglu_backward(dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor, up_g: tuple, up_u: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dg', du', silu(g') u')"""
    if not on_triton(g):
        g, u = lift(g, *up_g), lift(u, *up_u)
        silu = F.silu(g)
        return torch.ops.aten.silu_backward(dm * u, g), dm * silu, silu * u
    dg, du, m = torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
    (rows, width), sizes = g.shape, blocks(up_g[0].shape[1], g.dtype)
    grid = triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3])
    _swiglu_backward[grid](dm, g, u, *up_g, *up_u, dg, du, m, rows, width, *sizes)
    return dg, du, m


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin, x1 and x2 the halves of x [B, H, T, D]. The result lies in memory as [B, T, H, D], as attention takes it."""
    x = x.transpose(1, 2).contiguous()  # as the projection wrote it
    if not on_triton(x):
        one, two = x.chunk(2, dim=-1)
        return (x * cos[:, :, None] + torch.cat([-two, one], dim=-1) * sin[:, :, None]).transpose(1, 2)
    out, (batch, rows, heads, size) = torch.empty_like(x), x.shape
    _rotate[(batch * rows,)](
        x, cos.contiguous(), sin.contiguous(), out, heads, size // 2, triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    )
    return out.transpose(1, 2)


def fails_here(device, rank: int, dtype: torch.dtype) -> str | None:
    """Runs each kernel on this GPU, with a run's rank and dtype, against fp32 on the CPU, on sizes that divide by 16 and on others. The first
    one that is wrong or can't run, with what was seen; None where all are right."""
    for rows, width in ((1100, 256), (300, 200)):
        generator = torch.Generator().manual_seed(0)
        shapes = [(rows, width)] * 3 + [(rank, width), (rows, rank), (1, rows, 6, 16)]
        x, y, z, a, dh, q = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        mask, angle = torch.rand(rows, width + 9, generator=generator) < 0.9, torch.rand(1, rows, 8, generator=generator).repeat(1, 1, 2)
        lifted = dh, a.t().contiguous()
        three_of = [(a, a.flip(0), -a), (dh, dh.flip(0), -dh), (0, 3, 9)]  # at which column of the mask each one's begins
        cases: list[tuple] = [(swiglu, x, y, lifted, lifted), (swiglu_backward, x, y, z, lifted, lifted),
                              (rotate, q, angle.cos().to(dtype), angle.sin().to(dtype))]  # fmt: skip
        for n in (1, 2, 3):
            a_s, dhs, columns = (several[:n] for several in three_of)
            cases += [(down, x, a_s, columns), (grad_down, dhs, x, columns), (up, dhs, a_s, columns)]

        def compute(term, args, *to):
            place, args = mask.to(to[0]), tree_map(lambda arg: arg if isinstance(arg, int) else arg.to(*to, copy=True), args)
            if term in (down, grad_down, up):
                args[-1:] = tuple(place[:, at : at + width] for at in args[-1]), 1.7
            if term is rotate:
                args[0] = args[0].transpose(1, 2)
            out = term(*args)
            return [part.cpu().float() for part in ((out,) if isinstance(out, torch.Tensor) else out)]

        for term, *args in cases:
            try:
                ours, exact = compute(term, args, device, dtype), compute(term, args, "cpu", torch.float32)
            except Exception as error:  # a compiler that is missing, a card that is too small or unknown: whatever it is, PEFT's layers run
                return f"{term.__name__}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
            worst = max(((got - wanted).norm() / wanted.norm()).item() for got, wanted in zip(ours, exact))
            if not worst < 2e-2:
                return f"{term.__name__}: error {worst:.1e} against plain PyTorch"
    return None


@jit
def _kept(values, keep, at, inside):
    return tl.where(tl.load(keep + at, mask=inside, other=0) != 0, values, 0.0)


@jit
def _lower(values, keep, at, inside, a, k, r, width, rank):
    """drop(x) A^T of this block"""
    weights = tl.load(a + r[:, None] * width + k[None], mask=(r < rank)[:, None] & (k < width)[None], other=0.0)
    return tl.dot(_kept(values, keep, at, inside), tl.trans(weights), input_precision="ieee")


@jit
def _down(x, k0, k1, k2, a0, a1, a2, h0, h1, h2, rows, width, stride, scale, N: tl.constexpr, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
          K: tl.constexpr):  # fmt: skip
    t, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, R)
    s0, s1, s2 = tl.zeros([T, R], tl.float32), tl.zeros([T, R], tl.float32), tl.zeros([T, R], tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        inside, at = (t < rows)[:, None] & (k < width)[None], t[:, None] * stride + k[None]
        values = tl.load(x + t[:, None] * width + k[None], mask=inside, other=0.0)
        s0 += _lower(values, k0, at, inside, a0, k, r, width, rank)
        if N > 1:
            s1 += _lower(values, k1, at, inside, a1, k, r, width, rank)
        if N > 2:
            s2 += _lower(values, k2, at, inside, a2, k, r, width, rank)
    at, inside = t[:, None] * rank + r[None], (t < rows)[:, None] & (r < rank)[None]
    tl.store(h0 + at, s0 * scale, mask=inside)
    if N > 1:
        tl.store(h1 + at, s1 * scale, mask=inside)
    if N > 2:
        tl.store(h2 + at, s2 * scale, mask=inside)


@jit
def _outer(dh, values, keep, at, inside, t, r, rows, rank):
    """dh^T drop(x) of this block"""
    factors = tl.load(dh + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0)
    return tl.dot(tl.trans(factors), _kept(values, keep, at, inside), input_precision="ieee")


@jit
def _grad_down(d0, d1, d2, x, k0, k1, k2, out, rows, width, stride, share, scale, N: tl.constexpr, rank: tl.constexpr, R: tl.constexpr,
               T: tl.constexpr, K: tl.constexpr):  # fmt: skip
    k, r = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, R)
    first = tl.program_id(1).to(tl.int64) * share
    s0, s1, s2 = tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32)
    for start in range(0, share, T):
        t = first + start + tl.arange(0, T)
        inside, at = (t < rows)[:, None] & (k < width)[None], t[:, None] * stride + k[None]
        values = tl.load(x + t[:, None] * width + k[None], mask=inside, other=0.0)
        s0 += _outer(d0, values, k0, at, inside, t, r, rows, rank)
        if N > 1:
            s1 += _outer(d1, values, k1, at, inside, t, r, rows, rank)
        if N > 2:
            s2 += _outer(d2, values, k2, at, inside, t, r, rows, rank)
    out += tl.program_id(1) * N * rank * width + r[:, None] * width + k[None]
    inside = (r < rank)[:, None] & (k < width)[None]
    tl.store(out, s0 * scale, mask=inside)
    if N > 1:
        tl.store(out + rank * width, s1 * scale, mask=inside)
    if N > 2:
        tl.store(out + 2 * rank * width, s2 * scale, mask=inside)


@jit
def _raise(dh, a, keep, at, inside, t, k, r, rows, width, rank):
    """drop(dh A) of this block"""
    factors = tl.load(dh + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0)
    weights = tl.load(a + r[:, None] * width + k[None], mask=(r < rank)[:, None] & (k < width)[None], other=0.0)
    return _kept(tl.dot(factors, weights, input_precision="ieee"), keep, at, inside)


@jit
def _up(dx, d0, d1, d2, a0, a1, a2, k0, k1, k2, rows, width, stride, scale, N: tl.constexpr, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
        K: tl.constexpr):  # fmt: skip
    t, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, R)
    k = tl.program_id(1) * K + tl.arange(0, K)
    inside, at = (t < rows)[:, None] & (k < width)[None], t[:, None] * stride + k[None]
    sum = _raise(d0, a0, k0, at, inside, t, k, r, rows, width, rank)
    if N > 1:
        sum += _raise(d1, a1, k1, at, inside, t, k, r, rows, width, rank)
    if N > 2:
        sum += _raise(d2, a2, k2, at, inside, t, k, r, rows, width, rank)
    tl.store(dx + t[:, None] * width + k[None], sum * scale, mask=inside)


@jit
def _lifted(y, h, b, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    """This block of y + h B^T in fp32, with the places of its numbers and which of them exist."""
    t, k, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1) * K + tl.arange(0, K), tl.arange(0, R)
    at, inside = t[:, None] * width + k[None], (t < rows)[:, None] & (k < width)[None]
    factors = tl.load(h + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0)
    weights = tl.load(b + k[:, None] * rank + r[None], mask=(k < width)[:, None] & (r < rank)[None], other=0.0)
    values = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    return values + tl.dot(factors, tl.trans(weights), input_precision="ieee"), at, inside


@jit
def _swiglu(g, u, hg, bg, hu, bu, m, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    gate, at, inside = _lifted(g, hg, bg, rows, width, rank, R, T, K)
    up, at, inside = _lifted(u, hu, bu, rows, width, rank, R, T, K)
    tl.store(m + at, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _swiglu_backward(dm, g, u, hg, bg, hu, bu, dg, du, m, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    gate, at, inside = _lifted(g, hg, bg, rows, width, rank, R, T, K)
    up, at, inside = _lifted(u, hu, bu, rows, width, rank, R, T, K)
    grad = tl.load(dm + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(dg + at, grad * up * share * (1 + gate * (1 - share)), mask=inside)
    tl.store(du + at, grad * gate * share, mask=inside)
    tl.store(m + at, gate * share * up, mask=inside)


@jit
def _rotate(x, cos, sin, out, heads, half, H: tl.constexpr, D: tl.constexpr):
    t, h, d = tl.program_id(0).to(tl.int64), tl.arange(0, H), tl.arange(0, D)
    inside = (h < heads)[:, None] & (d < half)[None]
    at = t * heads * 2 * half + h[:, None] * 2 * half + d[None]
    one, two = tl.load(x + at, mask=inside, other=0.0).to(tl.float32), tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    angle = t * 2 * half + d  # both halves of a head turn by the same angles
    c, s = tl.load(cos + angle, mask=d < half, other=0.0).to(tl.float32)[None], tl.load(sin + angle, mask=d < half, other=0.0).to(tl.float32)[None]
    tl.store(out + at, one * c - two * s, mask=inside)
    tl.store(out + at + half, two * c + one * s, mask=inside)
