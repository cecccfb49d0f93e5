"""Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B).

It is the rate of the operations that the model needs, divided by the rate that the machine reaches.
That ceiling is a measured bf16 matrix rate, not a data sheet's: the one of `./launch.sh check` on
this machine or, without it, of one product before the run.
"""

from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..distributed.world import Ranks
from ..kernels import check_results
from ..model.flops import count_step_flops


def build_mfu(
    model: PreTrainedModel | PeftModel, model_config, ranks: Ranks
) -> Callable[[np.ndarray, int, float], dict[str, float]]:
    """A function of a step that returns {"train/mfu": 0..1}.

    It takes the lengths of the step's examples, the step's supervised tokens and its seconds. On a
    CPU it returns {}, because ranks share the cores with everything else. The output layer counts
    supervised tokens only. What gradient checkpointing computes twice counts once.
    """
    if ranks.device.type == "cpu":
        return lambda lengths, num_targets, seconds: {}
    teraflops = check_results.measured_speed("bf16 matrix product")
    if not teraflops:
        teraflops = matrix_rate(ranks.device)
    ceiling = teraflops * 1e12 * ranks.world_size
    cost = count_step_flops(model, model_config)

    def mfu(lengths: np.ndarray, num_targets: int, seconds: float) -> dict[str, float]:
        flops = (
            cost.per_token * lengths.sum()
            + cost.per_target * num_targets
            + cost.per_token_pair * np.square(lengths, dtype=np.float64).sum()
        )
        return {"train/mfu": flops / seconds / ceiling}

    return mfu


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a square bf16 product on this GPU, the fastest of five.

    It takes 10 ms on an H200. The run's random generator is left as it is.
    """
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16, generator=generator)
    milliseconds = []
    for _ in range(6):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(a, a)
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return 2 * size**3 / min(milliseconds[1:]) / 1e9  # the first one makes cuBLAS's handle
