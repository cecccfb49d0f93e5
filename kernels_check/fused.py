"""The loop's own Triton kernels (loop/kernels.py) against the same terms in plain PyTorch, in float64.

In the field: a kernel that reads past its mask, forgets a last partial block or adds shares in changing order trains on, only worse.
The sizes here are no multiples of any block.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils._pytree import tree_map

from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit
from loop.kernels import lora_ops as kernels

BOUND = 6e-3  # bf16 in and out, sums in fp32: one rounding of the result
REMEDY = "set fused=false"


def inputs(device: str) -> dict[str, tuple]:
    """For each term its arguments: T = 12,001 tokens (a quarter on a CPU), layers 2,040 wide, LoRA of rank 8, a head of 64."""
    generator, tokens = torch.Generator(device).manual_seed(0), 12001 if device == "cuda" else 3001

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    x, y, z = numbers(tokens, 2040), numbers(tokens, 2040), numbers(tokens, 2040)
    a_s, dhs = (
        tuple(numbers(3, 8, 2040)),
        tuple(numbers(3, tokens, 8)),
    )  # of queries, keys and values
    mask, lora = (
        torch.rand(tokens, 2072, device=device, generator=generator) < 0.9,
        (dhs[0], a_s[0].t().contiguous()),
    )
    drop = tuple(mask[:, at : at + 2040] for at in (0, 16, 32)), 2 / 0.9
    angle = torch.rand(1, tokens, 32, device=device, generator=generator).repeat(1, 1, 2)
    rotary = (
        numbers(1, tokens, 6, 64).transpose(1, 2),
        angle.cos().bfloat16(),
        angle.sin().bfloat16(),
    )
    return {
        "lora_down": (x, a_s, *drop),
        "grad_lora_a": (dhs, x, *drop),
        "lora_grad_input": (dhs, a_s, *drop),
        "swiglu": (x, y, lora, lora),
        "swiglu_backward": (x, y, z, lora, lora),
        "rotate": rotary,
    }


def in_plain_pytorch(term: Callable, args: tuple, dtype: torch.dtype) -> Callable:
    """A call of the term with Triton switched off, its numbers in `dtype`."""
    converted = tree_map(
        lambda arg: (
            arg.to(dtype, copy=True)
            if isinstance(arg, torch.Tensor) and arg.dtype != torch.bool
            else arg
        ),
        args,
    )

    def call():
        on_triton, kernels.on_triton = kernels.on_triton, lambda x: False
        try:
            return term(*converted)
        finally:
            kernels.on_triton = on_triton

    return call


def joined(out) -> torch.Tensor:
    return torch.cat([o.flatten() for o in (out if isinstance(out, tuple) else (out,))])


def check_term(name: str, term: Callable, args: tuple, device: str) -> Iterator[Row]:
    """Error against float64; speed against PyTorch's own kernels in bf16."""
    exact = joined(in_plain_pytorch(getattr(kernels, name), args, torch.float64)())
    ours = joined(
        term(
            *tree_map(
                lambda arg: (
                    arg.clone()
                    if isinstance(arg, torch.Tensor) and arg.dtype != torch.bool
                    else arg
                ),
                args,
            )
        )
    )
    plain = best_seconds(in_plain_pytorch(getattr(kernels, name), args, torch.bfloat16), device)
    version = (
        f"triton {kernels.triton.__version__}" if kernels.triton else f"torch {torch.__version__}"
    )
    yield judge(
        f"fused {name}",
        version,
        relative_error(ours, exact),
        BOUND,
        REMEDY,
        speed=plain / best_seconds(lambda: term(*args), device),
        slowest=0.5,
    )


def main() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield Row(
            "fused layers",
            "",
            "missing",
            note="Triton's kernels need an NVIDIA GPU; plain PyTorch computes the same",
            required=False,
        )
        return
    for name, args in inputs("cuda").items():
        yield from guarded(
            f"fused {name}", check_term, name, getattr(kernels, name), args, "cuda", required=False
        )


if __name__ == "__main__":
    emit(guarded("fused layers", main, required=False))
