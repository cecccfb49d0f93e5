"""Whether a base can be trained as the run wants it: asked before anything heavy."""

import numpy as np

from ..config.schema import Config, ConfigError
from ..data.tokenization import Example
from ..model.loading import config_errors_for, load_model_config
from ..model.structure import attention_shape, context_length, rotary_settings
from .isolation import check_isolation


def check_base(config: Config) -> None:
    """Raises ConfigError, in one line, where the base can't be trained right as the run wants it.

    It reads the base's configuration and no weights, and takes a second or a few.
    """
    model_config = load_model_config(config.base, config.revision)
    with config_errors_for(config.base):
        attention_shape(model_config)
    check_rotary(config, model_config)
    check_isolation(config)


def check_vocabulary(config: Config, examples: list[Example]) -> None:
    """Raises ConfigError where a token has no embedding."""
    model_config = load_model_config(config.base, config.revision)
    for example in examples:
        largest = int(np.max(example.input_ids))
        if largest >= model_config.vocab_size:
            raise ConfigError(
                f"base={config.base}: its tokenizer is larger than its embedding of "
                f"{model_config.vocab_size:,} tokens (id {example.id} has token {largest:,}); take "
                "the tokenizer that the base was trained with"
            )


def check_rotary(config: Config, model_config) -> None:
    """Raises ConfigError where one long document could change the positions of its neighbours."""
    limit = context_length(model_config)
    kinds = [rope.get("rope_type") for rope in rotary_settings(model_config)]
    if "longrope" not in kinds or limit is None:
        return
    if min(config.max_seq_len, model_config.max_position_embeddings) > limit:
        raise ConfigError(
            f"max_seq_len={config.max_seq_len}: above {limit:,} tokens this base changes its "
            f"rotary positions (longrope) for all documents of a row; set max_seq_len={limit}"
        )
