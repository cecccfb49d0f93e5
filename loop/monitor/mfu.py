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


def operations(model: PreTrainedModel | PeftModel, shape) -> tuple[int, int, int]:
    """Of a step for (a token, a supervised one's output layer besides, a pair of tokens of a document). shape: the base's configuration.

    Two for each weight and token forward, two for the gradient of the input, and two for that of a weight that is trained. Causal attention:
    half of the two products of a document with itself, three times."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    costs = {
        m: (6 if m.weight.requires_grad else 4) * m.in_features * m.out_features for m in linears
    }
    a_target = sum(
        costs.pop(m) for m in model.get_output_embeddings().modules() if m in costs
    )  # PEFT may have wrapped it
    return (
        sum(costs.values()),
        a_target,
        6 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim,
    )


def pair_cost(model: PreTrainedModel | PeftModel, shape) -> float:
    """How long attention between two tokens takes, in the time of a token's other work. Its kernels make fewer operations a second than products:
    by 1.5 in a trace of TinyLlama on an H200, by 1.9 in one of Llama-3-8B."""
    a_token, _, a_pair = operations(model, shape)
    return 1.7 * a_pair / a_token


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
    a_token, a_target, a_pair = operations(model, shape)

    def mfu(lengths: np.ndarray, num_targets: int, seconds: float) -> dict[str, float]:
        flops = (
            a_token * lengths.sum()
            + a_target * num_targets
            + a_pair * np.square(lengths, dtype=np.float64).sum()
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
