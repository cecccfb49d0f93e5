"""Does a run that is repeated take the same steps to the bit? Run by the attention check.

In the field: the backward pass of FlashAttention-2 adds with atomics, in whatever order blocks finish, unless it is asked for
a fixed one (flash-attention#414), and two equal runs drift apart. torch's deterministic mode asks, and so does the loop then.
"""

from collections.abc import Iterator

import torch

from kernels_check.packed_rows import Attend, packed_row, passes
from kernels_check.rows import Row, judge


def check_repeatable(name: str, version: str, attend: Attend, device: str) -> Iterator[Row]:
    """The same forward and backward four times in torch's deterministic mode. The error is the largest absolute difference."""
    row, bounds, longest = packed_row((1024,) * 4 if device == "cuda" else (128,) * 2, 64, device)

    def spread() -> float:
        first, *others = [passes(attend, row, bounds, longest) for _ in range(4)]
        return max((a - b).abs().max().item() for other in others for a, b in zip(first, other))

    by_default, before = spread(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        asked = spread()
    finally:
        torch.use_deterministic_algorithms(before)
    found = judge(
        f"attention {name}, repeatable",
        version,
        asked,
        0.0,
        "right, but no run can be repeated to the bit; attention=sdpa can",
    )
    found.required = False
    if by_default and not found.note:
        found.note = f"only in torch's deterministic mode: two runs of the default differ by {by_default:.1e}"
    yield found
