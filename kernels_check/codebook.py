"""The 16 values of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E), computed. Run by the nf4 check."""

from collections.abc import Iterator

import torch

from kernels_check.rows import Row, judge


def plain_codebook() -> torch.Tensor:
    """16 quantiles of N(0, 1), 7 below zero, zero, 8 above, each side scaled to reach 1 in magnitude. float64."""
    tail = (
        1 - (1 / 32 + 1 / 30) / 2
    )  # the outermost quantile: half a step inside, averaged over a grid of 16 and of 15
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64))[:-1].flip(0)
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64))[:-1]
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above]) / above[-1]


def check_codebook(version: str, code: torch.Tensor) -> Iterator[Row]:
    """`code` [16] against the quantiles: absolute error, bounded by fp32's own."""
    yield judge(
        "nf4 codebook",
        version,
        (code.double().cpu() - plain_codebook()).abs().max().item(),
        1e-6,
        "reinstall bitsandbytes at the pin",
    )
