"""Documents of one packed row must not see one another. The attention check runs it.

In the field: a leak of a percent hides in the rounding of bf16 and in no loss curve. So this check
compares bits.
"""

from collections.abc import Iterator

import torch

from kernels_check.packed_rows import LENGTHS, Attend, packed_row
from kernels_check.rows import Row, judge


def check_leak(name: str, version: str, attend: Attend, device: str) -> Iterator[Row]:
    """Changes a token of one document: no other may move by a bit, nor send it a gradient.

    The error is absolute.
    """
    row, bounds, longest = packed_row(LENGTHS, 64, device)
    start, end = bounds[2:4].tolist()
    others = torch.ones(len(row[0]), dtype=torch.bool, device=device)
    others[start:end] = False
    row = [x.requires_grad_() for x in row]
    before = attend(*row, bounds, longest)
    gradients = torch.autograd.grad(before[others].float().sum(), row)
    sent = max(gradient[start:end].abs().max().item() for gradient in gradients)
    token = torch.tensor([start], device=device)
    changed = [x.detach().index_fill(0, token, 3.0) for x in row]
    after = attend(*changed, bounds, longest)
    moved = (after[others] - before[others]).abs().max().item()
    remedy = "documents see one another: don't train with it, use attention=sdpa"
    yield judge(f"attention {name}, leak", version, max(moved, sent), 0.0, remedy)
