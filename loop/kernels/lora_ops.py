"""A decoder layer's operations with LoRA, each with its plain PyTorch version beside its launch.

On a GPU with Triton an operation is one kernel of triton_kernels.py, whose sections follow the same
order. Elsewhere the plain version runs, against which the kernel is tested.

LoRA's dropout is given as (keep_masks, scale). keep_masks has for each LoRA a bool [T, width], a
slice of the columns of one wider mask, or is None where nothing is dropped. scale multiplies
everything: LoRA's scaling divided by the fraction that is kept. Matrices are row-major.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dropout import apply_dropout_mask
from .triton_kernels import (
    grad_lora_a_kernel,
    grad_lora_b_kernel,
    grad_lora_b_sum,
    lora_down_kernel,
    lora_grad_input_kernel,
    lora_up_kernel,
    rotate_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
    triton,
)

# The operations that ./launch.sh check has a row for, "fused NAME".
FUSED_OPS = (
    "lora_down",
    "grad_lora_a",
    "grad_lora_b",
    "lora_up",
    "lora_grad_input",
    "swiglu",
    "swiglu_backward",
    "rotate",
)
TOKENS = 32  # of a block: the fastest of 16, 32, 64 and 128 for each kernel, on an H200
MOST_PARTIAL_SUMS, ROWS_OF_A_PARTIAL_SUM = 32, 512
NUMBERS_SUMMED_AT_ONCE = 8192
MOST_RANK = 64  # above, products with B are as fast by themselves


# ---- how a kernel is launched


class BlockSizes(NamedTuple):
    """The last arguments of a kernel, in its order."""

    rank: int
    padded_rank: int
    tokens: int
    columns: int


def block_sizes(rank: int, dtype: torch.dtype) -> BlockSizes:
    padded_rank = max(16, triton.next_power_of_2(rank))
    columns = 128 if padded_rank <= 64 and dtype != torch.float32 else 64
    return BlockSizes(rank, padded_rank, TOKENS, columns)


def on_triton(x: torch.Tensor) -> bool:
    """Whether x is computed by the Triton kernels.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, for tests.
    """
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def needs_separate_kernels(tensors, dtype: torch.dtype, rank: int, most: int = 32) -> bool:
    """Whether LoRAs of one input take a kernel each.

    Above rank `most` (half of it in fp32) three of them in one kernel spill registers, and need
    more shared memory than smaller cards have.
    """
    return len(tensors) > 1 and rank > (most if dtype != torch.float32 else most // 2)


def pad_to_three(tensors) -> tuple:
    """The tensors for a kernel that takes up to three. The added ones are not read."""
    missing = 3 - len(tensors)
    return (*tensors, *[tensors[-1]] * missing)


# ---- LoRA: down and up, and the gradients of A, of B and of the input


def lora_down(x: torch.Tensor, lora_as, keep_masks, scale: float) -> tuple[torch.Tensor, ...]:
    """h = scale drop(x) A^T [T, r] for each of up to three LoRAs of one input.

    x [T, width], each A [r, width]. The kernel reads x once and writes no drop(x).
    """
    if keep_masks is None:
        return tuple((x @ a.t()).mul_(scale) for a in lora_as)
    if not on_triton(x):
        return tuple(apply_dropout_mask(x, m, scale) @ a.t() for a, m in zip(lora_as, keep_masks))
    rows, width = x.shape
    rank = len(lora_as[0])
    if needs_separate_kernels(lora_as, x.dtype, rank):
        separate = (lora_down(x, (a,), (m,), scale) for a, m in zip(lora_as, keep_masks))
        return tuple(h for (h,) in separate)
    hs = x.new_empty(len(lora_as), rows, rank).unbind()
    lora_down_kernel[(triton.cdiv(rows, TOKENS),)](
        x,
        *pad_to_three(keep_masks),
        *pad_to_three(lora_as),
        *pad_to_three(hs),
        rows,
        width,
        keep_masks[0].stride(0),
        scale,
        len(lora_as),
        *block_sizes(rank, x.dtype),
    )
    return hs


def split_rows(rows: int, multiple: int = TOKENS) -> tuple[int, int]:
    """(the number of partial sums over this many rows, the rows of each)."""
    num_partials = max(1, min(MOST_PARTIAL_SUMS, rows // ROWS_OF_A_PARTIAL_SUM))
    return num_partials, triton.cdiv(triton.cdiv(rows, num_partials), multiple) * multiple


def grad_lora_a(dhs, x: torch.Tensor, keep_masks, scale: float) -> tuple[torch.Tensor, ...]:
    """dA = scale dh^T drop(x) [r, width] for each LoRA. dh [T, r], x [T, width].

    The kernel splits the sum over T into partial sums in fp32, which are added in a fixed order:
    the same bits in every run.
    """
    if keep_masks is None:
        return tuple((dh.t() @ x).mul_(scale) for dh in dhs)
    if not on_triton(x):
        return tuple(dh.t() @ apply_dropout_mask(x, m, scale) for dh, m in zip(dhs, keep_masks))
    rows, width = x.shape
    rank = dhs[0].shape[1]
    if needs_separate_kernels(dhs, x.dtype, rank):
        separate = (grad_lora_a((dh,), x, (m,), scale) for dh, m in zip(dhs, keep_masks))
        return tuple(da for (da,) in separate)
    sizes = block_sizes(rank, x.dtype)
    num_partials, rows_per_partial = split_rows(rows)
    partials = torch.empty(num_partials, len(dhs), rank, width, device=x.device)
    grad_lora_a_kernel[(triton.cdiv(width, sizes.columns), num_partials)](
        *pad_to_three(dhs),
        x,
        *pad_to_three(keep_masks),
        partials,
        rows,
        width,
        keep_masks[0].stride(0),
        rows_per_partial,
        scale,
        len(dhs),
        *sizes,
    )
    return partials.sum(0).to(x.dtype).unbind()


def grad_lora_b(
    dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dh = dy B [T, r], dB = dy^T h [N, r]). dy [T, N], h [T, r], B [N, r].

    The kernel reads dy once for both. Its partial sums are added as in `grad_lora_a`.
    """
    rank = b.shape[1]
    if not on_triton(dy) or rank > MOST_RANK:
        return dy @ b, dy.t() @ h
    dy = dy.contiguous()
    rows, width = dy.shape
    _, padded_rank, _, columns = block_sizes(rank, dy.dtype)
    tokens = 2 * TOKENS
    num_partials, rows_per_partial = split_rows(rows, tokens)
    num_blocks = triton.cdiv(width, columns)
    dh_partials = torch.empty(num_blocks, rows, rank, device=dy.device)
    db_partials = torch.empty(num_partials, width, rank, device=dy.device)
    grad_lora_b_kernel[(num_blocks, num_partials)](
        dy,
        h,
        b,
        dh_partials,
        db_partials,
        rows,
        width,
        rows_per_partial,
        rank,
        padded_rank,
        tokens,
        columns,
    )
    return sum_partials(dh_partials, dy.dtype), sum_partials(db_partials, dy.dtype)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of fp32 [partials, rows, rank] over partials, in a fixed order: [rows, rank]."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    padded = triton.next_power_of_2(len(partials))
    block = max(16, NUMBERS_SUMMED_AT_ONCE // padded)
    grad_lora_b_sum[(triton.cdiv(out.numel(), block),)](
        partials, out, len(partials), out.numel(), padded, block
    )
    return out


def lora_up(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + h B^T in place. y [T, N], h [T, r], B [N, r]."""
    rank = b.shape[1]
    if not on_triton(y) or rank > MOST_RANK:
        return y.addmm_(h, b.t())
    rows, width = y.shape
    sizes = block_sizes(rank, y.dtype)
    grid = triton.cdiv(rows, sizes.tokens), triton.cdiv(width, sizes.columns)
    lora_up_kernel[grid](y, h, b, rows, width, *sizes)
    return y


def lora_grad_input(
    dhs, lora_as, keep_masks, scale: float, dx: torch.Tensor | None = None
) -> torch.Tensor:
    """dx [T, width], the sum of scale drop(dh A) over the LoRAs. dh [T, r], A [r, width].

    With a dx it is added to that, in place.
    """
    if keep_masks is None:
        terms = list(zip(dhs, lora_as))
        if dx is None:
            dh, a = terms.pop(0)
            dx = dh @ (a * scale)
        for dh, a in terms:
            dx.addmm_(dh, a, alpha=scale)
        return dx
    rows, rank = dhs[0].shape
    width = lora_as[0].shape[1]
    dtype = dhs[0].dtype
    if not on_triton(dhs[0]) or needs_separate_kernels(dhs, dtype, rank, most=128):
        products = (
            apply_dropout_mask(dh @ a, mask, scale) for dh, a, mask in zip(dhs, lora_as, keep_masks)
        )
        return functools.reduce(torch.Tensor.add_, products if dx is None else (dx, *products))
    sizes = block_sizes(rank, dtype)
    out = dhs[0].new_empty(rows, width) if dx is None else dx
    lora_grad_input_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes.columns))](
        out,
        *pad_to_three(dhs),
        *pad_to_three(lora_as),
        *pad_to_three(keep_masks),
        rows,
        width,
        keep_masks[0].stride(0),
        scale,
        len(dhs),
        dx is not None,
        *sizes,
    )
    return out


# ---- SwiGLU of a gate and an up projection whose LoRA is not added yet


def add_lora(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + h B^T. y [T, N], h [T, r], b [N, r]."""
    return torch.addmm(y, h, b.t())


def swiglu(gate: torch.Tensor, up: torch.Tensor, gate_lora: tuple, up_lora: tuple) -> torch.Tensor:
    """silu(gate') up' [T, N], where gate' and up' are gate and up with their LoRA added.

    gate_lora and up_lora are (h [T, r], b [N, r]). The kernel writes neither gate' nor up'.
    """
    if not on_triton(gate):
        return F.silu(add_lora(gate, *gate_lora)) * add_lora(up, *up_lora)
    rows, width = gate.shape
    out = torch.empty_like(gate)
    sizes = block_sizes(gate_lora[0].shape[1], gate.dtype)
    swiglu_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes.columns))](
        gate, up, *gate_lora, *up_lora, out, rows, width, *sizes
    )
    return out


def swiglu_backward(
    d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gate_lora: tuple, up_lora: tuple
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the gradients of gate' and up', silu(gate') up' again) from d_out, that of swiglu's output.

    All are [T, N]. gate_lora and up_lora are as in `swiglu`.
    """
    if not on_triton(gate):
        gate, up = add_lora(gate, *gate_lora), add_lora(up, *up_lora)
        silu = F.silu(gate)
        return torch.ops.aten.silu_backward(d_out * up, gate), d_out * silu, silu * up
    rows, width = gate.shape
    d_gate, d_up, out = (torch.empty_like(gate) for _ in range(3))
    sizes = block_sizes(gate_lora[0].shape[1], gate.dtype)
    swiglu_backward_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes.columns))](
        d_out, gate, up, *gate_lora, *up_lora, d_gate, d_up, out, rows, width, *sizes
    )
    return d_gate, d_up, out


# ---- rotary positions


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin [B, H, T, D], where x1 and x2 are the halves of x along D.

    x [B, H, T, D], cos and sin [B, T, D]. The result lies in memory as [B, T, H, D], as attention
    takes it.
    """
    x = x.transpose(1, 2).contiguous()  # as the projection wrote it
    if not on_triton(x):
        x1, x2 = x.chunk(2, dim=-1)
        turned = torch.cat([-x2, x1], dim=-1)
        out = x * cos[:, :, None] + turned * sin[:, :, None]
        return out.transpose(1, 2)
    batch, rows, heads, head_dim = x.shape
    half = head_dim // 2
    out = torch.empty_like(x)
    rotate_kernel[(batch * rows,)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        heads,
        half,
        triton.next_power_of_2(heads),
        triton.next_power_of_2(half),
    )
    return out.transpose(1, 2)
