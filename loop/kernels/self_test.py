"""The terms of fused.py, each one kernel: Triton's where there is a GPU, elsewhere the same in plain PyTorch, which is what they are tested against.

LoRA's dropout is given as (keeps, scale): for each LoRA a mask, bool [T, width], columns of one wider mask, or None for all where nothing is
dropped; and what is multiplied by all the same: LoRA's scaling over the share that is kept. Matrices are row-major.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map

from .lora_ops import grad_lora_a, lora_down, lora_grad_input, rotate, swiglu, swiglu_backward


def fails_here(device, rank: int, dtype: torch.dtype) -> str | None:
    """Runs each kernel on this GPU, with a run's rank and dtype, against fp32 on the CPU, on sizes that divide by 16 and on others. The first
    one that is wrong or can't run, with what was seen; None where all are right."""
    for rows, width in ((1100, 256), (300, 200)):
        generator = torch.Generator().manual_seed(0)
        shapes = [(rows, width)] * 3 + [(rank, width), (rows, rank), (1, rows, 6, 16)]
        x, y, z, a, dh, q = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        mask, angle = (
            torch.rand(rows, width + 9, generator=generator) < 0.9,
            torch.rand(1, rows, 8, generator=generator).repeat(1, 1, 2),
        )
        lifted = dh, a.t().contiguous()
        three_of = [
            (a, a.flip(0), -a),
            (dh, dh.flip(0), -dh),
            (0, 3, 9),
        ]  # at which column of the mask each one's begins
        cases: list[tuple] = [
            (swiglu, x, y, lifted, lifted),
            (swiglu_backward, x, y, z, lifted, lifted),
            (rotate, q, angle.cos().to(dtype), angle.sin().to(dtype)),
        ]
        for n in (1, 2, 3):
            a_s, dhs, columns = (several[:n] for several in three_of)
            cases += [
                (lora_down, x, a_s, columns),
                (grad_lora_a, dhs, x, columns),
                (lora_grad_input, dhs, a_s, columns),
            ]

        def compute(term, args, *to):
            place, args = (
                mask.to(to[0]),
                tree_map(lambda arg: arg if isinstance(arg, int) else arg.to(*to, copy=True), args),
            )
            if term in (lora_down, grad_lora_a, lora_grad_input):
                args[-1:] = tuple(place[:, at : at + width] for at in args[-1]), 1.7
            if term is rotate:
                args[0] = args[0].transpose(1, 2)
            out = term(*args)
            return [
                part.cpu().float() for part in ((out,) if isinstance(out, torch.Tensor) else out)
            ]

        for term, *args in cases:
            try:
                ours, exact = (
                    compute(term, args, device, dtype),
                    compute(term, args, "cpu", torch.float32),
                )
            except Exception as error:  # a compiler that is missing, a card that is too small or unknown: whatever it is, PEFT's layers run
                return f"{term.__name__}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
            worst = max(
                ((got - wanted).norm() / wanted.norm()).item() for got, wanted in zip(ours, exact)
            )
            if not worst < 2e-2:
                return f"{term.__name__}: error {worst:.1e} against plain PyTorch"
    return None
