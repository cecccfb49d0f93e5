"""Whether a repeated run takes the same steps to the bit. The attention check runs it.

In the field: the backward pass of FlashAttention-2 adds with atomics, in whatever order blocks
finish, unless it is asked for a fixed one (flash-attention#414), and two equal runs drift apart.
torch's deterministic mode asks for it, and the loop then does so, too.
"""

from collections.abc import Iterator

import torch

from kernels_check.packed_rows import Attend, packed_row, run_both_passes
from kernels_check.rows import Row, judge


def check_repeatable(name: str, version: str, attend: Attend, device: str) -> Iterator[Row]:
    """Runs both passes four times in torch's deterministic mode.

    The error is the largest absolute difference. The note tells that of the default mode.
    """
    lengths = (1024,) * 4 if device == "cuda" else (128,) * 2
    row, bounds, longest = packed_row(lengths, 64, device)

    def largest_difference() -> float:
        first, *others = [run_both_passes(attend, row, bounds, longest) for _ in range(4)]
        return max((a - b).abs().max().item() for other in others for a, b in zip(first, other))

    by_default = largest_difference()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = largest_difference()
    finally:
        torch.use_deterministic_algorithms(before)
    remedy = "right, but no run can be repeated to the bit; attention=sdpa can"
    result = judge(f"attention {name}, repeatable", version, deterministic, 0.0, remedy)
    result.required = False
    if by_default and not result.note:
        result.note = (
            "only in torch's deterministic mode: two runs of the default differ by"
            f" {by_default:.1e}"
        )
    yield result
