"""Whether a base can be trained as the run wants it: asked before anything heavy."""

from typing import Any

import numpy as np

from ..config.schema import Config, ConfigError
from ..fp8.admission import admit_fp8
from ..model.loading import config_errors_for, load_model_config, load_tokenizer
from ..model.structure import attention_shape, context_length, rotary_settings
from .isolation import check_isolation


def admit_base(config: Config) -> tuple[Any, Any]:
    """(tokenizer, transformers configuration) of a base that can be trained as the run wants it.

    It reads no weights, and takes a second or a few. Raises ConfigError, in one line.
    """
    tokenizer = load_tokenizer(config.base, config.revision)
    model_config = load_model_config(config.base, config.revision)
    with config_errors_for(config.base):
        attention_shape(model_config)
    check_rotary(config, model_config)
    check_isolation(config)
    return tokenizer, model_config


def admit_run(config: Config, ds_config: dict) -> tuple[Any, Any]:
    """What `admit_base` returns, where this machine can compute as the run wants as well."""
    tokenizer, model_config = admit_base(config)
    admit_fp8(config, ds_config, model_config)
    return tokenizer, model_config


def check_vocabulary(base: str, model_config, tokens: dict[str, Any]) -> None:
    """Raises ConfigError where a token has no embedding. tokens: ids of each example, by its id."""
    for name, ids in tokens.items():
        if (largest := int(np.max(ids))) >= model_config.vocab_size:
            raise ConfigError(
                f"base={base}: its tokenizer is larger than its embedding of "
                f"{model_config.vocab_size:,} tokens (id {name} has token {largest:,}); take the "
                "tokenizer that the base was trained with"
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
