"""Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B): what the model's products need, by what the machine was seen to do.

The ceiling is the bf16 matrix rate that `./launch.sh check` measured here, not a data sheet's; without one nothing is said.
"""

from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from . import verdicts
from .distributed import Ranks


def utilisation(model: PreTrainedModel | PeftModel, shape, ranks: Ranks) -> Callable[[np.ndarray, int, float], dict[str, float]]:
    """A function of (lengths of the step's examples, its supervised tokens, seconds) -> {"train/mfu": 0..1}; {} on a CPU, whose cores
    the ranks share with everything else, and without a ceiling.

    Two operations for each weight and token forward, two for the gradient of the input, and two for that of a weight that is trained.
    Causal attention: half of the two products of a document with itself, three times. The output layer sees supervised tokens only.
    What gradient checkpointing computes twice counts once. `shape`: the base's configuration."""
    rate = verdicts.speed("bf16 matrix product")  # TFLOP/s of one GPU
    if rate is None or ranks.device.type == "cpu":
        return lambda lengths, num_targets, seconds: {}
    ceiling = rate * 1e12 * ranks.world_size
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    costs = {m: (6 if m.weight.requires_grad else 4) * m.in_features * m.out_features for m in linears}
    a_target = sum(costs.pop(m) for m in model.get_output_embeddings().modules() if m in costs)  # PEFT may have wrapped it
    a_token = sum(costs.values())
    a_pair = 6 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim

    def mfu(lengths: np.ndarray, num_targets: int, seconds: float) -> dict[str, float]:
        flops = a_token * lengths.sum() + a_target * num_targets + a_pair * np.square(lengths, dtype=np.float64).sum()
        return {"train/mfu": flops / seconds / ceiling}

    return mfu
