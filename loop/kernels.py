"""The terms of fused.py, each one kernel: Triton's where there is a GPU, elsewhere the same in plain PyTorch, which is what they are tested against.

`drop` is (keep bool [T, width], scale) or None: what is kept is multiplied by scale; keep may be columns of a wider mask. Matrices are row-major.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

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
    """(rank, the rank's block, tokens of a block, columns of a block): as much as shared memory holds in three stages."""
    padded = max(16, triton.next_power_of_2(rank))
    return rank, padded, TOKENS, 128 if padded <= 64 and dtype != torch.float32 else 64


def on_triton(x: torch.Tensor) -> bool:
    """Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on a CPU, for tests."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def down(x: torch.Tensor, a: torch.Tensor, drop) -> torch.Tensor:
    """drop(x) A^T [T, r], without writing drop(x) down on a GPU."""
    if drop is None or not on_triton(x):
        return (x if drop is None else masked(x, *drop)) @ a.t()
    (keep, scale), (rows, width), rank = drop, x.shape, len(a)
    h = x.new_empty(rows, rank)
    _down[(triton.cdiv(rows, TOKENS),)](x, keep, a, h, rows, width, keep.stride(0), scale, *blocks(rank, x.dtype))
    return h


def grad_down(dh: torch.Tensor, x: torch.Tensor, drop) -> torch.Tensor:
    """dA = dh^T drop(x) [r, K]. The sum over T is cut into shares that are added in a fixed order: the same bits in every run."""
    if drop is None or not on_triton(x):
        return dh.t() @ (x if drop is None else masked(x, *drop))
    (keep, scale), (rows, width), rank = drop, x.shape, dh.shape[1]
    shares = torch.empty(max(1, min(32, rows // 512)), rank, width, device=x.device)
    sizes = blocks(rank, x.dtype)
    grid, share = (triton.cdiv(width, sizes[3]), len(shares)), triton.cdiv(triton.cdiv(rows, len(shares)), TOKENS) * TOKENS
    _grad_down[grid](dh, x, keep, shares, rows, width, keep.stride(0), share, *sizes)
    return shares.sum(0).mul_(scale).to(dh.dtype)


def add_up(dx: torch.Tensor, dh: torch.Tensor, a: torch.Tensor, drop) -> torch.Tensor:
    """dx += drop(dh A), in place."""
    if drop is None:
        return dx.addmm_(dh, a)
    if not on_triton(dx):
        return dx.add_(masked(dh @ a, *drop))
    (keep, scale), (rows, width), rank = drop, dx.shape, len(a)
    sizes = blocks(rank, dx.dtype)
    _add_up[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3]))](dx, dh, a, keep, rows, width, keep.stride(0), scale, *sizes)
    return dx


def lift(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """y + scale h B^T. y [T, N], h [T, r], b [N, r]"""
    return torch.addmm(y, h, b.t(), alpha=scale)


def swiglu(g: torch.Tensor, u: torch.Tensor, up_g: tuple, up_u: tuple) -> torch.Tensor:
    """silu(g') u', where g' and u' are g and u with their LoRA's (h, b, scale) lifted onto them, without writing them down on a GPU."""
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
        up = dh, a.t().contiguous(), 1.5
        cases: list[tuple] = [(down, x, a, mask), (grad_down, dh, x, mask), (add_up, x, dh, a, mask), (swiglu, x, y, up, up),
                 (swiglu_backward, x, y, z, up, up), (rotate, q, angle.cos().to(dtype), angle.sin().to(dtype))]  # fmt: skip

        def compute(term, args, *to):
            args = [(mask.to(to[0])[:, :width], 1 / 0.9) if arg is mask else (dh.to(*to), up[1].to(*to), 1.5) if arg is up else
                    arg.to(*to, copy=True) for arg in args]  # fmt: skip
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
def _down(x, keep, a, h, rows, width, stride, scale, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    t, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, R)
    sum = tl.zeros([T, R], tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        inside = (t < rows)[:, None] & (k < width)[None]
        values = tl.load(x + t[:, None] * width + k[None], mask=inside, other=0.0)
        kept = tl.where(tl.load(keep + t[:, None] * stride + k[None], mask=inside, other=0) != 0, values, 0.0)
        weights = tl.load(a + r[:, None] * width + k[None], mask=(r < rank)[:, None] & (k < width)[None], other=0.0)
        sum += tl.dot(kept, tl.trans(weights), input_precision="ieee")
    tl.store(h + t[:, None] * rank + r[None], sum * scale, mask=(t < rows)[:, None] & (r < rank)[None])


@jit
def _grad_down(dh, x, keep, out, rows, width, stride, share, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    k, r = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, R)
    first = tl.program_id(1).to(tl.int64) * share
    sum = tl.zeros([R, K], tl.float32)
    for start in range(0, share, T):
        t = first + start + tl.arange(0, T)
        inside = (t < rows)[:, None] & (k < width)[None]
        values = tl.load(x + t[:, None] * width + k[None], mask=inside, other=0.0)
        kept = tl.where(tl.load(keep + t[:, None] * stride + k[None], mask=inside, other=0) != 0, values, 0.0)
        factors = tl.load(dh + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0)
        sum += tl.dot(tl.trans(factors), kept, input_precision="ieee")
    out += tl.program_id(1) * rank * width
    tl.store(out + r[:, None] * width + k[None], sum, mask=(r < rank)[:, None] & (k < width)[None])


@jit
def _add_up(dx, dh, a, keep, rows, width, stride, scale, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    t, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.arange(0, R)
    k = tl.program_id(1) * K + tl.arange(0, K)
    inside = (t < rows)[:, None] & (k < width)[None]
    factors = tl.load(dh + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0)
    weights = tl.load(a + r[:, None] * width + k[None], mask=(r < rank)[:, None] & (k < width)[None], other=0.0)
    kept = tl.load(keep + t[:, None] * stride + k[None], mask=inside, other=0) != 0
    old = tl.load(dx + t[:, None] * width + k[None], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + t[:, None] * width + k[None], old + tl.where(kept, tl.dot(factors, weights, input_precision="ieee") * scale, 0.0), mask=inside)


@jit
def _lifted(y, h, b, scale, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    """This block of y + scale h B^T in fp32, with the places of its numbers and which of them exist."""
    t, k, r = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1) * K + tl.arange(0, K), tl.arange(0, R)
    at, inside = t[:, None] * width + k[None], (t < rows)[:, None] & (k < width)[None]
    factors = tl.load(h + t[:, None] * rank + r[None], mask=(t < rows)[:, None] & (r < rank)[None], other=0.0)
    weights = tl.load(b + k[:, None] * rank + r[None], mask=(k < width)[:, None] & (r < rank)[None], other=0.0)
    values = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    return values + tl.dot(factors, tl.trans(weights), input_precision="ieee") * scale, at, inside


@jit
def _swiglu(g, u, hg, bg, sg, hu, bu, su, m, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    gate, at, inside = _lifted(g, hg, bg, sg, rows, width, rank, R, T, K)
    up, at, inside = _lifted(u, hu, bu, su, rows, width, rank, R, T, K)
    tl.store(m + at, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _swiglu_backward(dm, g, u, hg, bg, sg, hu, bu, su, dg, du, m, rows, width, rank: tl.constexpr, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    gate, at, inside = _lifted(g, hg, bg, sg, rows, width, rank, R, T, K)
    up, at, inside = _lifted(u, hu, bu, su, rows, width, rank, R, T, K)
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
