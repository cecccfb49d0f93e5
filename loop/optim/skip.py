"""The optimiser's side of the step: AdamW, clipping over ZeRO-3's partitions, and the learning rate as a function of the step."""

import math
import statistics
from collections.abc import Sequence


def loss_spike_threshold(recent: Sequence[float], sigmas: float | None) -> float:
    """The loss above which a step is a spike: `sigmas` standard deviations above the mean of the `recent` ones, of which it takes 20."""
    if sigmas is None or len(recent) < 20:
        return math.inf
    return statistics.fmean(recent) + sigmas * statistics.pstdev(recent)
