"""Where things are in a transformers model: its decoder layers, and the shape of its attention."""

from typing import Any

import torch.nn as nn
from peft import PeftModel
from transformers import PreTrainedModel

from ..config.schema import ConfigError


def attention_shape(model_config) -> tuple[int, int, int]:
    """(query heads, key and value heads, size of a head).

    model_config: of a language model, as transformers has it; it need not name the last two.
    """
    query_heads = model_config.num_attention_heads
    key_value_heads = getattr(model_config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // query_heads
    return query_heads, key_value_heads, head_dim


def with_usual_names(model_config):
    """The configuration with `head_dim` and `intermediate_size`, whatever its family calls them.

    Raises ConfigError where there is not one size of heads.
    """
    try:
        hidden = model_config.hidden_size
        heads = model_config.num_attention_heads
        head_dim = getattr(model_config, "head_dim", None)
    except (AttributeError, RuntimeError) as error:  # the latter where layers differ
        raise ConfigError(
            f"base: {model_config.model_type} has no attention heads, or such of different sizes; "
            "take a base built like Llama"
        ) from error
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    found = [getattr(model_config, name, None) for name in names]
    inner = next(filter(None, found), 4 * hidden)
    if not head_dim:
        model_config.head_dim = hidden // heads
    model_config.intermediate_size = inner
    return model_config


def context_length(model_config) -> int | None:
    """The most tokens that a base can see at once; None where its configuration names no limit.

    longrope (arXiv 2402.13753) takes other factors for a whole row as soon as one document in it
    exceeds the length that the base was first trained with. So that length counts.
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    for rope in rotary_settings(model_config):
        before = rope.get("original_max_position_embeddings") or getattr(
            model_config, "original_max_position_embeddings", None
        )
        if limit and before and rope.get("rope_type") == "longrope":
            limit = min(limit, before)
        if limit and before and rope.get("rope_type") == "yarn":  # limit may be `before`
            limit = max(limit, int(before * rope.get("factor", 1)))
    return limit


def rotary_settings(model_config) -> list[dict[str, Any]]:
    """The settings of rotary positions: one, or one for each kind of layer."""
    rope = getattr(model_config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The stack of decoder layers, below PEFT's wrapper if there is one.

    Raises ConfigError for a model without such a stack.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        # Some models name themselves as their decoder.
        return getattr(base.get_decoder(), "layers", None) or base.model.layers
    except AttributeError as error:
        raise ConfigError(
            f"{type(base).__name__} has no stack of decoder layers; take a base built like Llama"
        ) from error


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout of a base to 0, whether it is a module or a number in another module."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("jitter_noise")):
                setattr(module, name, 0.0)
