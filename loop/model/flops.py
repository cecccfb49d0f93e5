"""How many floating-point operations a training step takes, from the model's own modules."""

from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel


class StepFlops(NamedTuple):
    """Operations of a training step."""

    per_token: int
    per_target: int  # of the output layer, which sees supervised tokens alone
    per_token_pair: int  # of attention, for two tokens of one document


def count_step_flops(model: PreTrainedModel | PeftModel, model_config) -> StepFlops:
    """Operations of forward and backward pass together.

    A weight takes two for each token in the forward pass, two for the gradient of its input, and
    two more for its own gradient if it is trained. Causal attention takes half of the two products
    of a document with itself, three times.
    """
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    costs = {
        m: (6 if m.weight.requires_grad else 4) * m.in_features * m.out_features for m in linears
    }
    output_layer = model.get_output_embeddings()  # PEFT may have wrapped it
    per_target = sum(costs.pop(m) for m in output_layer.modules() if m in costs)
    heads = model_config.num_hidden_layers * model_config.num_attention_heads
    return StepFlops(sum(costs.values()), per_target, 6 * heads * model_config.head_dim)


def attention_pair_cost(model: PreTrainedModel | PeftModel, model_config) -> float:
    """The time that attention takes between two tokens, in units of a token's other work.

    Attention kernels reach fewer operations a second than matrix products: 1.5 times fewer in a
    trace of TinyLlama on an H200, 1.9 times in one of Llama-3-8B.
    """
    flops = count_step_flops(model, model_config)
    return 1.7 * flops.per_token_pair / flops.per_token
