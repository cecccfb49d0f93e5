"""A stranger's base: its files are checked before a library reads them, and no code of it runs.

`check_base_folder` looks at JSON files and at the headers of weights, so it takes milliseconds and
allocates nothing. What it refuses would end in a pickle, a traceback, or memory that runs out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..config.schema import ConfigError

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_JSON_BYTES = 16 * 2**20  # of config.json; a tokenizer's is larger, and Rust reads it
MOST = 2**31  # of a number in a configuration: more is no model's
# Whole numbers of at least 1, by the names that most families use. A list has one for each layer.
COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head",
    "num_key_value_heads", "hidden_size", "n_embd", "intermediate_size", "vocab_size",
    "max_position_embeddings", "head_dim",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd")
HEADS = ("num_attention_heads", "n_head")
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
DTYPES = ("float32", "float16", "bfloat16", "float64")
WEIGHTS = "model.safetensors"
NUMBERS = ("F16", "BF16", "F32", "F64")  # safetensors' names; a weight of another type is a code
# What the loop reads of a model's output, whatever its configuration wishes.
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def check_base_folder(base: str, folder: Path) -> None:
    """Raises ConfigError for a folder whose configuration or files can't be those of a model.

    That is: files that are no JSON, weights that are pickles, numbers that are none, and numbers
    that are not those of the stored weights. base: as it was typed, for messages.
    """
    if (folder / ADAPTER).exists():
        raise ConfigError(
            f"base={base}: holds an adapter ({ADAPTER}), which transformers would put on the base: "
            "remove that file for the base alone, or merge the adapter into it"
        )
    config = read_object(base, folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(
            f"base={base}: cannot be loaded: config.json: model_type={_show(model_type)}: "
            "must be the name of a kind of model"
        )
    for key in ("auto_map", "quantization_config", "text_config"):
        if not isinstance(config.get(key, {}) or {}, dict):
            raise ConfigError(f"base={base}: config.json: {key} must be an object")
    text = config.get("text_config") or config  # of a model that also sees or hears
    _check_counts(base, text)
    for key in ("dtype", "torch_dtype"):
        if isinstance(text.get(key), str) and text[key] not in DTYPES:
            raise ConfigError(
                f"base={base}: config.json: {key}={_show(text[key])}: must be {', '.join(DTYPES)}"
            )
    tensors = list(_stored_tensors(base, folder))
    if not tensors:
        return
    _check_against_weights(base, text, {name: shape for name, shape, _ in tensors})
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise ConfigError(
            f"base={base}: has *.safetensors, but neither {WEIGHTS} nor {INDEX}, by which weights "
            "are found: copy the one that is missing"
        )
    codes = [
        name
        for name, shape, dtype in tensors
        if dtype not in NUMBERS and len(shape) == 2 and name.endswith(".weight")
    ]
    if codes and not config.get("quantization_config"):
        raise ConfigError(
            f"base={base}: {codes[0][:80]} is stored as codes, and config.json has no "
            "quantization_config: take the base as 16-bit numbers"
        )


def stored_shapes(base: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor by its name; {} without safetensors. Raises ConfigError."""
    return {name: shape for name, shape, _ in _stored_tensors(base, folder)}


def read_model_config(location: dict[str, Any], revision: str | None) -> Any:
    """The transformers configuration of a base, without what the loop itself chooses.

    location: keyword arguments of `from_pretrained`, of `resolve_base`. Runs no code of the base.
    """
    config = AutoConfig.from_pretrained(**location, revision=revision)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            # transformers takes a file's before what the caller asks for.
            part._attn_implementation_internal = None
            for key, value in OUTPUTS.items():
                setattr(part, key, value)
    return config


def read_object(base: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ConfigError(f"base={base}: {path.name} is larger than {MOST_JSON_BYTES:,} bytes")
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"base={base}: {path.name} cannot be read ({type(error).__name__}); copy it anew"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"base={base}: {path.name} must hold one JSON object")
    return found


def _check_counts(base: str, config: dict[str, Any]) -> None:
    for key in COUNTS:
        value = config.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is None:
                continue
            if type(number) is not int or not 1 <= number < MOST:
                raise ConfigError(
                    f"base={base}: config.json: {key}={_show(value)}: must be a whole number from "
                    "1 upwards"
                )
    width, heads = _first(config, WIDTHS), _first(config, HEADS)
    if width and heads and not config.get("head_dim") and heads > width:
        raise ConfigError(
            f"base={base}: config.json: {heads} attention heads in a hidden size of {width}"
        )


def _stored_tensors(base: str, folder: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, type) of each stored tensor, from the files' headers. Raises ConfigError."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = read_object(base, folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"base={base}: {INDEX} has no weight_map")
        files = sorted({str(name) for name in weight_map.values()})
        for name in files:
            if name.endswith(PICKLES) or not name.endswith(".safetensors"):
                raise ConfigError(
                    f"base={base}: {INDEX} names {_show(name)}: only safetensors are read, never a "
                    "pickle"
                )
            if Path(name).name != name or not (folder / name).is_file():
                raise ConfigError(f"base={base}: lacks {_show(name)}, which its index names")
    elif not files and (pickles := [p for p in folder.iterdir() if p.suffix in PICKLES]):
        raise ConfigError(
            f"base={base}: its weights are in {pickles[0].name}: only safetensors are read, never "
            "a pickle"
        )
    for name in files:
        if not (folder / name).is_file():  # a pipe would be read for ever
            raise ConfigError(f"base={base}: {name} is not a file; copy it anew")
        try:
            with safe_open(folder / name, "np") as file:
                for key in file.keys():
                    tensor = file.get_slice(key)
                    yield key, tuple(tensor.get_shape()), tensor.get_dtype()
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"base={base}: {name} is damaged or cut off ({str(error)[:100]}); copy it anew"
            ) from error


def _check_against_weights(
    base: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """What config.json says of layers, vocabulary and width must be what is stored."""
    numbers = [int(found[1]) for found in map(LAYER.search, shapes) if found]
    layers = _first(config, LAYERS)
    if numbers and layers and layers > 1 + max(numbers):
        raise ConfigError(
            f"base={base}: config.json names {layers:,} layers, and the weights have "
            f"{1 + max(numbers)}; one of the two is of another model"
        )
    found = next((shape for key, shape in shapes.items() if EMBEDDINGS.search(key)), None)
    vocabulary = config.get("vocab_size")
    if found and len(found) == 2 and vocabulary and found[0] != vocabulary:
        raise ConfigError(
            f"base={base}: config.json: vocab_size={vocabulary:,}, and the embeddings are those of "
            f"{found[0]:,} tokens"
        )
    padding = config.get("pad_token_id")
    if isinstance(padding, int) and vocabulary and padding >= vocabulary:
        raise ConfigError(
            f"base={base}: config.json: pad_token_id={padding:,}, and the vocabulary has "
            f"{vocabulary:,} tokens"
        )
    width = _first(config, WIDTHS)
    if found and len(found) == 2 and width and width > 2 * max(found[1], 64):
        raise ConfigError(
            f"base={base}: config.json: hidden_size={width:,}, and the embeddings have {found[1]:,}"
        )


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int)), None)


def _show(value: Any) -> str:
    return repr(value)[:60]
