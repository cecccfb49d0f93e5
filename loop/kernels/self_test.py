"""Runs each Triton kernel on this GPU against plain PyTorch, before a run relies on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from ..distributed.progress import track
from .lora_ops import (
    grad_lora_a,
    grad_lora_b,
    lora_down,
    lora_grad_input,
    lora_up,
    rotate,
    swiglu,
    swiglu_backward,
)

SIZES = ((1100, 256), (300, 200))  # (tokens, width): both divide by 16, and not
DROPOUT_SCALE = 1.7
BOUND = 2e-2  # relative error against fp32
OPS_WITH_DROPOUT: tuple[Callable, ...] = (lora_down, grad_lora_a, lora_grad_input)


def find_failing_kernel(device, rank: int, dtype: torch.dtype) -> str | None:
    """The first operation that is wrong or can't run on this GPU and how; None where all are right.

    Each runs in `dtype` on the device, with LoRA's `rank`, against fp32 on the CPU.
    """
    cases = [
        (op, args, width)
        for rows, width in SIZES
        for op, args in make_cases(rows, width, rank, dtype)
    ]
    for op, args, width in track(cases, "compiling and testing kernels", "kernels"):
        try:
            ours = run_op(op, args, width, device, dtype)
            exact = run_op(op, args, width, "cpu", torch.float32)
        # A compiler that is missing, a card that is too small or unknown. Whatever it is, PEFT's
        # layers run.
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0][:120]
            return f"{op.__name__}: {type(error).__name__}: {message}"
        errors = [
            ((got - wanted).norm() / wanted.norm()).item() for got, wanted in zip(ours, exact)
        ]
        if not max(errors) < BOUND:
            return f"{op.__name__}: error {max(errors):.1e} against plain PyTorch"
    return None


def make_cases(
    rows: int, width: int, rank: int, dtype: torch.dtype
) -> list[tuple[Callable, tuple]]:
    """(operation, its arguments) for each kernel, and for one, two and three LoRAs of an input.

    The last argument of the operations with dropout is (the wide mask, the columns at which the
    LoRAs' masks begin); `run_op` cuts the masks out on the device.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, y, z = (random(rows, width) for _ in range(3))
    a = random(rank, width)
    dh = random(rows, rank)
    q = random(1, rows, 6, 16)
    mask = torch.rand(rows, width + 9, generator=generator) < 0.9
    angle = torch.rand(1, rows, 8, generator=generator).repeat(1, 1, 2)
    lora = dh, a.t().contiguous()
    cases: list[tuple[Callable, tuple]] = [
        (grad_lora_b, (x, *lora)),
        (lora_up, (y, *lora)),
        (swiglu, (x, y, lora, lora)),
        (swiglu_backward, (x, y, z, lora, lora)),
        (rotate, (q, angle.cos().to(dtype), angle.sin().to(dtype))),
    ]
    for n in (1, 2, 3):
        lora_as = (a, a.flip(0), -a)[:n]
        dhs = (dh, dh.flip(0), -dh)[:n]
        dropout = mask, (0, 3, 9)[:n]
        cases += [
            (lora_down, (x, lora_as, dropout)),
            (grad_lora_a, (dhs, x, dropout)),
            (lora_grad_input, (dhs, lora_as, dropout)),
        ]
    return cases


def run_op(op: Callable, args: tuple, width: int, device, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the operation returns for copies of its arguments there, in fp32 on the CPU."""

    def copy(arg):
        if not isinstance(arg, torch.Tensor):
            return arg
        if arg.dtype == torch.bool:
            return arg.to(device)
        return arg.to(device, dtype, copy=True)

    *inputs, last = tree_map(copy, args)
    if op in OPS_WITH_DROPOUT:
        mask, columns = last
        keep_masks = tuple(mask[:, start : start + width] for start in columns)
        out = op(*inputs, keep_masks, DROPOUT_SCALE)
    elif op is rotate:
        x, cos = inputs
        out = rotate(x.transpose(1, 2), cos, last)
    else:
        out = op(*inputs, last)
    results = (out,) if isinstance(out, torch.Tensor) else out
    return [result.cpu().float() for result in results]
