"""Whether a base can be trained as the run wants it: asked before anything heavy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ..config.schema import Config, ConfigError
from ..model.loading import (
    LIBRARY_ERRORS,
    check_loaded,
    checked_base,
    config_errors_for,
    load_model_config,
    load_tokenizer,
)
from ..model.streaming import check_shapes
from ..model.structure import attention_shape, context_length, rotary_settings
from ..optim.lora_targets import put_lora
from ..untrusted.bases import read_model_config, stored_shapes
from .isolation import check_isolation

# A family has all of these, and transformers assumes some other model's where one is missing.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)


def admit_base(config: Config) -> tuple[Any, Any]:
    """(tokenizer, transformers configuration) of a base that can be trained as the run wants it.

    It reads no weights, and takes a second or a few. Raises ConfigError, in one line.
    """
    tokenizer = load_tokenizer(config.base, config.revision)
    model_config = load_model_config(config.base, config.revision)
    with config_errors_for(config.base):
        attention_shape(model_config)
        check_stored_weights(config.base, config.revision)
    check_rotary(config, model_config)
    check_isolation(config)
    check_lora_fits(config)
    return tokenizer, model_config


def check_stored_weights(base: str, revision: str | None) -> None:
    """Raises ConfigError where a local base's files are not those that its configuration wants.

    Only headers are read. Names that transformers changes while it loads, as those of experts, are
    judged by what it reports then.
    """
    location = checked_base(base, revision)
    model_config = read_model_config(location, revision)
    stored = getattr(model_config, "quantization_config", None) or {}
    if stored:
        check_stored_codes(base, stored if isinstance(stored, dict) else stored.to_dict())
    folder = Path(location["pretrained_model_name_or_path"])
    shapes = stored_shapes(base, folder) if folder.is_dir() and not stored else {}
    if not shapes or type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    except LIBRARY_ERRORS:
        return  # `check_isolation` says what is wrong with this family
    if shapes.keys() <= model.state_dict().keys():
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        missing = wanted.keys() - shapes.keys() - model.all_tied_weights_keys.keys()
        try:
            check_shapes(base, wanted, shapes)
            check_loaded(base, {"mismatched_keys": [], "missing_keys": missing})
        except ConfigError as error:
            raise ConfigError(f"{error}{say_assumed_sizes(folder, model_config)}") from error


def say_assumed_sizes(folder: Path, model_config) -> str:
    """What transformers assumes for sizes that a base's config.json does not name; "" for none."""
    values = json.loads((folder / "config.json").read_text("utf-8"))
    values = values.get("text_config") or values
    text = model_config.get_text_config(decoder=True)
    assumed = [
        f"{size}={getattr(text, size)}"
        for size in SIZES
        if hasattr(text, size) and not {size, text.attribute_map.get(size)} & values.keys()
    ]
    if not assumed:
        return ""
    return f" (config.json does not say {', '.join(assumed)}, which transformers assumes)"


def check_stored_codes(base: str, stored: dict[str, Any]) -> None:
    """Raises ConfigError for a base that is stored quantised, but for bitsandbytes' 4 bits.

    stored: the quantization_config of its config.json.
    """
    method = str(stored.get("quant_method") or "by a method that its config.json does not name")
    if "bitsandbytes" in method and stored.get("load_in_8bit"):
        method = "bitsandbytes, 8 bits"  # it would be loaded so, whatever the run asks for
    elif "bitsandbytes" in method:
        return
    raise ConfigError(
        f"base={base}: is stored quantised ({method[:60]}): take the 16-bit model that it was "
        "made from"
    )


def check_lora_fits(config: Config) -> None:
    """Raises ConfigError where `lora` names what this base lacks: told by a model without weights.

    All layers are there, as some keys name them by their numbers.
    """
    if config.method == "full":
        return
    model_config = read_model_config(checked_base(config.base, config.revision), config.revision)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
            put_lora(model, config.lora)
    except ConfigError as error:
        raise ConfigError(f"base={config.base}: {error}") from error


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
