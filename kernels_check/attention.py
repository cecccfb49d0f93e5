"""Packed attention against plain softmax attention, document by document, in float64.

In the field: flash-attn built for another torch dies as `undefined symbol` (flash-attention#931 and
many like it), and torch's varlen kernel changed its signature between 2.10 and 2.13. The check runs
what trains: `loop.kernels.attention.packed_attention`, with each backend of its table.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from kernels_check.leak import check_leak
from kernels_check.packed_rows import LENGTHS, Attend, packed_row, run_both_passes
from kernels_check.repeatable import check_repeatable
from kernels_check.rows import Row, best_seconds, failure, guarded, judge
from kernels_check.table import emit
from loop.kernels.attention import packed_attention
from loop.kernels.attention_backends import available_backends

BOUND = 2e-2  # bf16 has 8 bits: 4e-3 for each rounding, and a few of them meet in a gradient


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v of each document alone, causal.

    query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D].
    """
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))  # [H, L, D]
        group_size = q.shape[0] // k.shape[0]  # query heads that a key head serves
        k, v = (x.repeat_interleave(group_size, 0) for x in (k, v))
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def worst_document_error(got: torch.Tensor, wanted: torch.Tensor, bounds: list[int]) -> float:
    """The largest error of a document, so that a long one does not hide a short one.

    It is relative to the full row, as a document of one token has gradients of zero. NaN if any is
    NaN. got and wanted [T, H, D].
    """
    scale = wanted.square().mean().sqrt()
    errors = []
    for start, end in pairwise(bounds):
        difference = (got[start:end].double() - wanted[start:end]).square().mean().sqrt()
        errors.append((difference / scale).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def check_numbers(name: str, version: str, attend: Attend, device: str) -> Iterator[Row]:
    """The worst error over output and gradients, both head sizes and every document."""
    errors = []
    for head_dim in (64, 128):
        row, cu_seqlens, longest = packed_row(LENGTHS, head_dim, device)
        bounds = cu_seqlens.unique().tolist()
        exact_row = [x.double() for x in row]
        wanted = run_both_passes(plain_attention, exact_row, cu_seqlens, longest)
        got = run_both_passes(attend, row, cu_seqlens, longest)
        errors += [worst_document_error(g, w, bounds) for g, w in zip(got, wanted)]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    lengths: tuple[int, ...]
    if device == "cuda":
        lengths, slowest = (2048,) * 8, 0.3
    else:
        lengths, slowest = (512,) * 2, 0.0  # there is no other backend for a CPU
    plain_seconds, seconds = (
        best_seconds(partial(run_both_passes, f, *packed_row(lengths, 64, device)), device, 3)
        for f in (plain_attention, attend)
    )
    yield judge(
        f"attention {name}",
        version,
        worst,
        BOUND,
        "set attention= to another",
        speed=plain_seconds / seconds,
        slowest=slowest,
    )


def main() -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # sdpa first: it is the one that can't crash.
    for name, version in reversed(available_backends(device).items()):
        what = f"attention {name}"
        attend = partial(packed_attention, backend=name)
        if version.startswith("missing: "):
            reason = version.removeprefix("missing: ")
            yield failure(what, ModuleNotFoundError(reason), required=False)
            continue
        for check in (check_numbers, check_leak, check_repeatable):
            yield from guarded(what, check, name, version, attend, device, required=name == "sdpa")


if __name__ == "__main__":
    emit(guarded("attention", main))
