"""Packed attention against plain softmax attention, document by document, in float64.

In the field: flash-attn built for another torch dies as `undefined symbol` (flash-attention#931 and many like it); torch's varlen
kernel changed its signature between 2.10 and 2.13. Checked is what is trained with: `loop.kernels.attention.packed_attention`.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from kernels_check.leak import check_leak
from kernels_check.packed_rows import LENGTHS, Attend, packed_row, passes
from kernels_check.repeatable import check_repeatable
from kernels_check.rows import Row, best_seconds, failure, guarded, judge
from kernels_check.table import emit
from loop.kernels.attention import packed_attention
from loop.kernels.attention_backends import available_backends

BOUND = 2e-2  # bf16 keeps 8 bits: 4e-3 a rounding, a few of which meet in a gradient


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D]: softmax(q k' / sqrt(D)) v of each document alone, causal."""
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))  # [H, L, D]
        k, v = (
            x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v)
        )  # each key head serves a group of query heads
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def check_numbers(name: str, version: str, attend: Attend, device: str) -> Iterator[Row]:
    """Worst error over output and gradients, both head sizes and every document (a short one is not drowned by a long one)."""
    worst = 0.0
    for head_dim in (64, 128):
        row, bounds, longest = packed_row(LENGTHS, head_dim, device)
        wanted = passes(plain_attention, [x.double() for x in row], bounds, longest)
        for got, want in zip(passes(attend, row, bounds, longest), wanted):
            for start, end in pairwise(bounds.unique().tolist()):
                gap = (
                    got[start:end].double() - want[start:end]
                ).square().mean().sqrt() / want.square().mean().sqrt()
                worst = max(worst, gap.item()) if gap == gap else float("nan")
    lengths, slowest = (
        ((2048,) * 8, 0.3) if device == "cuda" else ((512,) * 2, 0.0)
    )  # there is no other to take on a CPU
    plain, ours = (
        best_seconds(partial(passes, f, *packed_row(lengths, 64, device)), device, 3)
        for f in (plain_attention, attend)
    )
    yield judge(
        f"attention {name}",
        version,
        worst,
        BOUND,
        "set attention= to another",
        speed=plain / ours,
        slowest=slowest,
    )


def main() -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, version in reversed(
        available_backends(device).items()
    ):  # sdpa first: it is the one that can't crash
        what, attend = f"attention {name}", partial(packed_attention, backend=name)
        if version.startswith("missing: "):
            yield failure(what, ModuleNotFoundError(version[9:]), required=False)
            continue
        for check in (check_numbers, check_leak, check_repeatable):
            yield from guarded(what, check, name, version, attend, device, required=name == "sdpa")


if __name__ == "__main__":
    emit(guarded("attention", main))
