"""The 16 values of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E), computed.

The nf4 check runs it.
"""

from collections.abc import Iterator

import torch

from kernels_check.rows import Row, judge


def plain_codebook() -> torch.Tensor:
    """The codebook, float64 [16], ascending.

    16 quantiles of N(0, 1): 7 below zero, zero, 8 above. Each side is scaled to reach 1 in
    magnitude.
    """
    # The outermost quantile: half a step inside, averaged over a grid of 16 and one of 15.
    tail = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64))[:-1].flip(0)
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64))[:-1]
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above]) / above[-1]


def check_codebook(version: str, code: torch.Tensor) -> Iterator[Row]:
    """`code` [16] against the quantiles: absolute error, bounded by fp32's own."""
    error = (code.double().cpu() - plain_codebook()).abs().max().item()
    yield judge("nf4 codebook", version, error, 1e-6, "reinstall bitsandbytes at the pin")
