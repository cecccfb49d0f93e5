"""When a step is skipped because its loss is a spike."""

import math
import statistics
from collections.abc import Sequence

MIN_LOSSES = 20  # fewer say too little about the spread


def loss_spike_threshold(recent: Sequence[float], sigmas: float | None) -> float:
    """The loss above which a step is a spike, and its update is skipped.

    It is `sigmas` standard deviations above the mean of the `recent` losses, and infinite where
    `sigmas` is None or there are fewer than 20 losses.
    """
    if sigmas is None or len(recent) < MIN_LOSSES:
        return math.inf
    return statistics.fmean(recent) + sigmas * statistics.pstdev(recent)
