"""Whether a base can be trained as the run wants it: asked before anything heavy."""

from typing import Any

import numpy as np

from ..config.schema import Config, ConfigError
from ..data.tokenization import Example
from ..model.loading import config_errors_for, load_model_config
from ..model.structure import attention_shape
from .isolation import check_isolation


def check_base(config: Config, examples: list[Example]) -> None:
    """Raises ConfigError, in one line, where the base can't be trained right on these examples.

    It reads the base's configuration and no weights.
    """
    model_config = load_model_config(config.base, config.revision)
    with config_errors_for(config.base):
        attention_shape(model_config)
    check_vocabulary(config, model_config, examples)
    check_rotary(config, model_config)
    check_isolation(config)


def check_vocabulary(config: Config, model_config, examples: list[Example]) -> None:
    """Raises ConfigError where a token has no embedding."""
    for example in examples:
        largest = int(np.max(example.input_ids))
        if largest >= model_config.vocab_size:
            raise ConfigError(
                f"base={config.base}: its tokenizer is larger than its embedding of "
                f"{model_config.vocab_size:,} tokens (id {example.id} has token {largest:,}); take "
                "the tokenizer that the base was trained with"
            )


def check_rotary(config: Config, model_config) -> None:
    """Raises ConfigError where one long document would change the positions of its neighbours.

    longrope (arXiv 2402.13753) and dynamic NTK take other factors for the whole row as soon as a
    document in it exceeds the length that the base was first trained with.
    """
    for rope in rotary_settings(model_config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in ("longrope", "dynamic"):
            continue
        limit = model_config.max_position_embeddings
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings") or getattr(
                model_config, "original_max_position_embeddings", limit
            )
        longest = min(config.max_seq_len, model_config.max_position_embeddings)
        if longest > limit:
            raise ConfigError(
                f"max_seq_len={config.max_seq_len}: above {limit:,} tokens this base changes its "
                f"rotary positions ({kind}) for all documents of a row; set max_seq_len={limit}"
            )


def rotary_settings(model_config) -> list[dict[str, Any]]:
    """The settings of rotary positions: one, or one for each kind of layer."""
    rope = getattr(model_config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]
