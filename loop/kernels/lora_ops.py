"""The terms of fused.py, each one kernel: Triton's where there is a GPU, elsewhere the same in plain PyTorch, which is what they are tested against.

LoRA's dropout is given as (keeps, scale): for each LoRA a mask, bool [T, width], columns of one wider mask, or None for all where nothing is
dropped; and what is multiplied by all the same: LoRA's scaling over the share that is kept. Matrices are row-major.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F

from .triton_kernels import (
    grad_lora_a_kernel,
    lora_down_kernel,
    lora_grad_input_kernel,
    rotate_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
    triton,
)

apply_dropout_mask = torch.ops.aten.native_dropout_backward  # x * keep * scale in one kernel
TOKENS = 32  # of a block: the fastest of 16, 32, 64 and 128 for each kernel, on an H200


def blocks(rank: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rank, the rank's block, tokens of a block, columns of a block)"""
    padded = max(16, triton.next_power_of_2(rank))
    return rank, padded, TOKENS, 128 if padded <= 64 and dtype != torch.float32 else 64


def needs_separate_kernels(tensors, dtype: torch.dtype, rank: int, most: int = 32) -> bool:
    """Whether LoRAs of one input take a kernel each: above rank 32 (16 in fp32) three of them spill registers, and need more shared memory
    than smaller cards have."""
    return len(tensors) > 1 and rank > (most if dtype != torch.float32 else most // 2)


def on_triton(x: torch.Tensor) -> bool:
    """Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on a CPU, for tests."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def lora_down(x: torch.Tensor, a_s, keeps, scale: float) -> tuple[torch.Tensor, ...]:
    """h = scale drop(x) A^T [T, r] for each of up to three LoRAs of one input. On a GPU it is read once, and no drop(x) is written."""
    if keeps is None:
        return tuple((x @ a.t()).mul_(scale) for a in a_s)
    if not on_triton(x):
        return tuple(apply_dropout_mask(x, keep, scale) @ a.t() for a, keep in zip(a_s, keeps))
    (rows, width), rank = x.shape, len(a_s[0])
    if needs_separate_kernels(a_s, x.dtype, rank):
        return tuple(h for a, keep in zip(a_s, keeps) for h in lora_down(x, (a,), (keep,), scale))
    hs = x.new_empty(len(a_s), rows, rank).unbind()
    lora_down_kernel[(triton.cdiv(rows, TOKENS),)](
        x,
        *pad_to_three(keeps),
        *pad_to_three(a_s),
        *pad_to_three(hs),
        rows,
        width,
        keeps[0].stride(0),
        scale,
        len(a_s),
        *blocks(rank, x.dtype),
    )
    return hs


def grad_lora_a(dhs, x: torch.Tensor, keeps, scale: float) -> tuple[torch.Tensor, ...]:
    """dA = scale dh^T drop(x) [r, K] for each. The sum over T is cut into shares that are added in a fixed order: the same bits in every run."""
    if keeps is None:
        return tuple((dh.t() @ x).mul_(scale) for dh in dhs)
    if not on_triton(x):
        return tuple(dh.t() @ apply_dropout_mask(x, keep, scale) for dh, keep in zip(dhs, keeps))
    (rows, width), rank = x.shape, dhs[0].shape[1]
    if needs_separate_kernels(dhs, x.dtype, rank):
        return tuple(
            da for dh, keep in zip(dhs, keeps) for da in grad_lora_a((dh,), x, (keep,), scale)
        )
    sizes = blocks(rank, x.dtype)
    shares = torch.empty(max(1, min(32, rows // 512)), len(dhs), rank, width, device=x.device)
    grid, share = (
        (triton.cdiv(width, sizes[3]), len(shares)),
        triton.cdiv(triton.cdiv(rows, len(shares)), TOKENS) * TOKENS,
    )
    grad_lora_a_kernel[grid](
        *pad_to_three(dhs),
        x,
        *pad_to_three(keeps),
        shares,
        rows,
        width,
        keeps[0].stride(0),
        share,
        scale,
        len(dhs),
        *sizes,
    )
    return shares.sum(0).to(x.dtype).unbind()


def lora_grad_input(dhs, a_s, keeps, scale: float) -> torch.Tensor:
    """dx [T, K], the sum of scale drop(dh A)."""
    if keeps is None:
        dx = dhs[0] @ (a_s[0] * scale)
        for dh, a in zip(dhs[1:], a_s[1:]):
            dx.addmm_(dh, a, alpha=scale)
        return dx
    (rows, rank), width = dhs[0].shape, a_s[0].shape[1]
    if not on_triton(dhs[0]) or needs_separate_kernels(dhs, dhs[0].dtype, rank, most=128):
        parts = zip(dhs, a_s, keeps)
        return functools.reduce(
            torch.Tensor.add_, (apply_dropout_mask(dh @ a, keep, scale) for dh, a, keep in parts)
        )
    dx, sizes = dhs[0].new_empty(rows, width), blocks(rank, dhs[0].dtype)
    grid = triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3])
    lora_grad_input_kernel[grid](
        dx,
        *pad_to_three(dhs),
        *pad_to_three(a_s),
        *pad_to_three(keeps),
        rows,
        width,
        keeps[0].stride(0),
        scale,
        len(dhs),
        *sizes,
    )
    return dx


def pad_to_three(tensors) -> tuple:
    """What a kernel that takes up to three is called with; what it has no use for is not read."""
    return *tensors, *(tensors[-1],) * (3 - len(tensors))


def add_lora(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + h B^T. y [T, N], h [T, r], b [N, r]"""
    return torch.addmm(y, h, b.t())


def swiglu(g: torch.Tensor, u: torch.Tensor, up_g: tuple, up_u: tuple) -> torch.Tensor:
    """silu(g') u', where g' and u' are g and u with their LoRA's (h, b) lifted onto them, without writing them down on a GPU."""
    if not on_triton(g):
        return F.silu(add_lora(g, *up_g)) * add_lora(u, *up_u)
    m, (rows, width), sizes = torch.empty_like(g), g.shape, blocks(up_g[0].shape[1], g.dtype)
    swiglu_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3]))](
        g, u, *up_g, *up_u, m, rows, width, *sizes
    )
    return m


def swiglu_backward(
    dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor, up_g: tuple, up_u: tuple
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dg', du', silu(g') u')"""
    if not on_triton(g):
        g, u = add_lora(g, *up_g), add_lora(u, *up_u)
        silu = F.silu(g)
        return torch.ops.aten.silu_backward(dm * u, g), dm * silu, silu * u
    dg, du, m = torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
    (rows, width), sizes = g.shape, blocks(up_g[0].shape[1], g.dtype)
    grid = triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes[3])
    swiglu_backward_kernel[grid](dm, g, u, *up_g, *up_u, dg, du, m, rows, width, *sizes)
    return dg, du, m


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin, x1 and x2 the halves of x [B, H, T, D]. The result lies in memory as [B, T, H, D], as attention takes it."""
    x = x.transpose(1, 2).contiguous()  # as the projection wrote it
    if not on_triton(x):
        one, two = x.chunk(2, dim=-1)
        return (x * cos[:, :, None] + torch.cat([-two, one], dim=-1) * sin[:, :, None]).transpose(
            1, 2
        )
    out, (batch, rows, heads, size) = torch.empty_like(x), x.shape
    rotate_kernel[(batch * rows,)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        heads,
        size // 2,
        triton.next_power_of_2(heads),
        triton.next_power_of_2(size // 2),
    )
    return out.transpose(1, 2)
