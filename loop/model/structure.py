"""The model: a 4-bit base with LoRA on every linear layer, or plain LoRA, or all weights, ready for `deepspeed.initialize`."""

import torch.nn as nn
from peft import PeftModel
from transformers import PreTrainedModel

from ..config.schema import ConfigError


def heads_of(shape) -> tuple[int, int, int]:
    """(of queries, of keys and values, their size)"""
    return (
        shape.num_attention_heads,
        getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads,
        shape.head_dim,
    )


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The stack of decoder layers, below PEFT's wrapping if there is one."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        return base.get_decoder().layers
    except AttributeError as error:
        raise ConfigError(
            f"{type(base).__name__} has no stack of decoder layers; take a base built like Llama"
        ) from error
