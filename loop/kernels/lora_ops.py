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
    lora_down_kernel,
    lora_grad_input_kernel,
    rotate_kernel,
    swiglu_backward_kernel,
    swiglu_joint_kernel,
    swiglu_kernel,
    triton,
)

# The operations that ./launch.sh check has a row for, "fused NAME".
FUSED_OPS = (
    "lora_down",
    "grad_lora_a",
    "lora_grad_input",
    "swiglu",
    "swiglu_backward",
    "swiglu_joint",
    "rotate",
)
TOKENS = 32  # of a block: the fastest of 16, 32, 64 and 128 for each kernel, on an H200
MOST_PARTIAL_SUMS, ROWS_OF_A_PARTIAL_SUM = 32, 512


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


# ---- LoRA: down, and the gradients of A and of the input


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
    num_partials = max(1, min(MOST_PARTIAL_SUMS, rows // ROWS_OF_A_PARTIAL_SUM))
    partials = torch.empty(num_partials, len(dhs), rank, width, device=x.device)
    rows_per_partial = triton.cdiv(triton.cdiv(rows, num_partials), TOKENS) * TOKENS
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


def lora_grad_input(dhs, lora_as, keep_masks, scale: float) -> torch.Tensor:
    """dx [T, width], the sum of scale drop(dh A) over the LoRAs. dh [T, r], A [r, width]."""
    if keep_masks is None:
        dx = dhs[0] @ (lora_as[0] * scale)
        for dh, a in zip(dhs[1:], lora_as[1:]):
            dx.addmm_(dh, a, alpha=scale)
        return dx
    rows, rank = dhs[0].shape
    width = lora_as[0].shape[1]
    dtype = dhs[0].dtype
    if not on_triton(dhs[0]) or needs_separate_kernels(dhs, dtype, rank, most=128):
        terms = (
            apply_dropout_mask(dh @ a, mask, scale) for dh, a, mask in zip(dhs, lora_as, keep_masks)
        )
        return functools.reduce(torch.Tensor.add_, terms)
    sizes = block_sizes(rank, dtype)
    dx = dhs[0].new_empty(rows, width)
    lora_grad_input_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes.columns))](
        dx,
        *pad_to_three(dhs),
        *pad_to_three(lora_as),
        *pad_to_three(keep_masks),
        rows,
        width,
        keep_masks[0].stride(0),
        scale,
        len(dhs),
        *sizes,
    )
    return dx


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
        gate = add_lora(gate, *gate_lora)
        up = add_lora(up, *up_lora)
        silu = F.silu(gate)
        return torch.ops.aten.silu_backward(d_out * up, gate), d_out * silu, silu * up
    rows, width = gate.shape
    d_gate, d_up, out = (torch.empty_like(gate) for _ in range(3))
    sizes = block_sizes(gate_lora[0].shape[1], gate.dtype)
    swiglu_backward_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(width, sizes.columns))](
        d_out, gate, up, *gate_lora, *up_lora, d_gate, d_up, out, rows, width, *sizes
    )
    return d_gate, d_up, out


def swiglu_joint(joint: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As `swiglu` [T, N], of gate, up and their LoRA computed by one product.

    joint [T, 2 N + r] holds gate, up and h of both. b [2 N, r] is B of both, each with zeros where
    h is the other's. For few rows: the kernel reads b for each.
    """
    width = len(b) // 2
    if not on_triton(joint):
        gate, up = add_lora(joint[:, : 2 * width], joint[:, 2 * width :], b).chunk(2, dim=1)
        return F.silu(gate) * up
    out = joint.new_empty(len(joint), width)
    padded_rank = triton.next_power_of_2(b.shape[1])
    columns = max(16, min(128, 8192 // padded_rank))
    swiglu_joint_kernel[(len(joint), triton.cdiv(width, columns))](
        joint, b, out, width, b.shape[1], padded_rank, columns
    )
    return out


# ---- rotary positions


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin [B, H, T, D], where x1 and x2 are the halves of x along D.

    x [B, H, T, D], cos and sin [B, T, D]. The result lies in memory as [B, T, H, D], as attention
    takes it.
    """
    x = x.transpose(1, 2)  # as the projection wrote it
    if not on_triton(x):
        x1, x2 = x.chunk(2, dim=-1)
        turned = torch.cat([-x2, x1], dim=-1)
        out = x * cos[:, :, None] + turned * sin[:, :, None]
        return out.transpose(1, 2)
    batch, rows, heads, head_dim = x.shape
    half = head_dim // 2
    if x.stride()[2:] != (head_dim, 1) or (batch > 1 and rows > 1):
        x = x.contiguous()
    out = x.new_empty(x.shape)
    rotate_kernel[(batch * rows,)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        x.stride(0 if rows == 1 else 1),  # of a product's columns: that of the wider row
        heads,
        half,
        triton.next_power_of_2(heads),
        triton.next_power_of_2(half),
    )
    return out.transpose(1, 2)
