"""Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B): what the model's products need, by what the machine was seen to do.

The ceiling is the bf16 matrix rate that `./launch.sh check` measured here, or one product before the run, not a data sheet's.
"""

from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..distributed.world import Ranks
from ..kernels import check_results
from ..model.flops import count_step_flops


def utilisation(
    model: PreTrainedModel | PeftModel, shape, ranks: Ranks
) -> Callable[[np.ndarray, int, float], dict[str, float]]:
    """A function of (lengths of the step's examples, its supervised tokens, seconds) -> {"train/mfu": 0..1}; {} on a CPU, whose cores
    the ranks share with everything else.

    The output layer sees supervised tokens only. What gradient checkpointing computes twice counts once. `shape`: the base's configuration."""
    if ranks.device.type == "cpu":
        return lambda lengths, num_targets, seconds: {}
    ceiling = (
        (check_results.measured_speedup("bf16 matrix product") or matrix_rate(ranks.device))
        * 1e12
        * ranks.world_size
    )
    flops_of = count_step_flops(model, shape)

    def mfu(lengths: np.ndarray, num_targets: int, seconds: float) -> dict[str, float]:
        flops = (
            flops_of.per_token * lengths.sum()
            + flops_of.per_target * num_targets
            + flops_of.per_token_pair * np.square(lengths, dtype=np.float64).sum()
        )
        return {"train/mfu": flops / seconds / ceiling}

    return mfu


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a square bf16 product on this GPU, the fastest of five: 10 ms of work on an H200."""
    generator, times = torch.Generator(device).manual_seed(0), []  # the run's own stays as it is
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16, generator=generator)
    for _ in range(6):  # the first one makes cuBLAS's handle
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, a)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * size**3 / min(times[1:]) / 1e9
