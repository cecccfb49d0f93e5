"""The loop's Triton kernels (loop/kernels/) against their plain PyTorch versions in float64.

In the field: a kernel that reads past its mask, forgets a last partial block or adds partial sums
in changing order trains on, only worse. The sizes here are no multiples of any block.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils._pytree import tree_map

from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit
from loop.kernels import lora_ops

BOUND = 6e-3  # bf16 in and out, sums in fp32: one rounding of the result
REMEDY = "set fused_layers=false"
WIDTH, RANK, HEADS, HEAD_DIM = 2040, 8, 6, 64
MASK_COLUMNS = (0, 16, 32)  # where the masks of three LoRAs begin


def inputs(device: str) -> dict[str, tuple]:
    """The arguments of each operation of `lora_ops.FUSED_OPS`.

    T = 12,001 tokens (601 on a CPU), layers 2,040 wide, LoRA of rank 8, heads of 64.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens = 12001 if device == "cuda" else 601

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    x, y, z = (randn(tokens, WIDTH) for _ in range(3))
    lora_as = tuple(randn(3, RANK, WIDTH))  # of queries, keys and values
    dhs = tuple(randn(3, tokens, RANK))
    mask = rand(tokens, WIDTH + MASK_COLUMNS[-1]) < 0.9
    keep_masks = tuple(mask[:, start : start + WIDTH] for start in MASK_COLUMNS)
    dropout = keep_masks, 2 / 0.9
    lora = (dhs[0], lora_as[0].t().contiguous())
    angle = rand(1, tokens, HEAD_DIM // 2).repeat(1, 1, 2)
    q = randn(1, tokens, HEADS, HEAD_DIM).transpose(1, 2)
    return {
        "lora_down": (x, lora_as, *dropout),
        "grad_lora_a": (dhs, x, *dropout),
        "lora_grad_input": (dhs, lora_as, *dropout),
        "swiglu": (x, y, lora, lora),
        "swiglu_backward": (x, y, z, lora, lora),
        "swiglu_joint": (randn(250, 2 * WIDTH + RANK), randn(2 * WIDTH, RANK)),
        "rotate": (q, angle.cos().bfloat16(), angle.sin().bfloat16()),
    }


def copied(args: tuple, dtype: torch.dtype) -> tuple:
    """The arguments with copies of their numbers in `dtype`; masks and scalars as they are."""

    def copy(arg):
        is_numbers = isinstance(arg, torch.Tensor) and arg.dtype != torch.bool
        return arg.to(dtype, copy=True) if is_numbers else arg

    return tree_map(copy, args)


def in_plain_pytorch(op: Callable, args: tuple, dtype: torch.dtype) -> Callable:
    """A call of the operation without Triton, its numbers in `dtype`."""
    converted = copied(args, dtype)

    def call():
        on_triton = lora_ops.on_triton
        lora_ops.on_triton = lambda x: False
        try:
            return op(*converted)
        finally:
            lora_ops.on_triton = on_triton

    return call


def flattened(out) -> torch.Tensor:
    """What an operation returns, one tensor or several, as one vector."""
    return torch.cat([part.flatten() for part in (out if isinstance(out, tuple) else (out,))])


def check_op(name: str, op: Callable, args: tuple, device: str) -> Iterator[Row]:
    """Error of `op` against float64; speed against PyTorch's own kernels in bf16."""
    reference = getattr(lora_ops, name)
    exact = flattened(in_plain_pytorch(reference, args, torch.float64)())
    ours = flattened(op(*copied(args, torch.bfloat16)))
    plain_seconds = best_seconds(in_plain_pytorch(reference, args, torch.bfloat16), device)
    version = f"torch {torch.__version__}"
    if lora_ops.triton:
        version = f"triton {lora_ops.triton.__version__}"
    yield judge(
        f"fused {name}",
        version,
        relative_error(ours, exact),
        BOUND,
        REMEDY,
        speed=plain_seconds / best_seconds(lambda: op(*args), device),
        slowest=0.5,
    )


def main() -> Iterator[Row]:
    if not torch.cuda.is_available():
        note = "Triton's kernels need an NVIDIA GPU; plain PyTorch computes the same"
        yield Row("fused layers", "", "missing", note=note, required=False)
        return
    all_inputs = inputs("cuda")
    for name in lora_ops.FUSED_OPS:
        op, args = getattr(lora_ops, name), all_inputs[name]
        yield from guarded(f"fused {name}", check_op, name, op, args, "cuda", required=False)


if __name__ == "__main__":
    emit(guarded("fused layers", main, required=False))
