"""A model's folder becomes one GGUF file, which llama.cpp and Ollama run.

The weights are read and written one tensor at a time. The file is read again at the end and
compared with them: a number in f16 is the bf16 one, a number in Q8_0 is at most half a step of its
block away. See `reader.py` for the other direction and for the names of the tensors.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..config.schema import ConfigError, check_path
from ..distributed.files import atomic_folder
from ..export.card import TRAINED, check_card, is_adapter, settings_of, write_card
from ..export.merge import StoredBase, check_free_space, find_base
from ..export.ollama import modelfile
from ..generation.prompt import prompt_texts
from ..model.loading import load_tokenizer
from .reader import LAYER_MODULES, OUTER_MODULES
from .tokenizer import tokenizer_metadata

# What transformers calls the architectures that are "llama" to llama.cpp.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
KINDS = ("f16", "q8_0")
Q8_BLOCK = 32  # numbers that share a scale
FACTORS = "rope_freqs.weight"  # by which llama.cpp divides the rotary frequencies
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class StoredTensor:
    """How a weight lies in the file."""

    name: str  # there
    kind: str  # of gguf's GGMLQuantizationType: F32, F16 or Q8_0
    shape: tuple[int, ...]


def export_gguf(model: str, out: str, kind: str) -> Path:
    """Writes `out` with model-KIND.gguf, a Modelfile for Ollama and a card; returns the file.

    Args:
        model: the folder of a merged or full model.
        out: a folder that is new or empty.
        kind: of `KINDS`: 2 bytes a weight, or 8.5 bits. Vectors are fp32.

    Raises ConfigError for a model that is no Llama, or whose tokenizer llama.cpp does not have,
    OSError where nothing can be written. Nothing is left of `out` then.
    """
    gguf = import_gguf()
    source = find_model(model)
    config = AutoConfig.from_pretrained(source.folder)
    tokenizer = load_tokenizer(model)
    trained = read_trained(source.folder)
    if trained:
        check_card(f"--model {model}", source.folder, trained)
    prompt = trained.get("prompt") or prompt_texts()
    metadata = shape_metadata(source, config) | tokenizer_metadata(tokenizer, config.vocab_size)
    context = trained.get("max_seq_len") or config.max_position_embeddings
    weights = {name: storage_of(source, name, kind) for name in source.files}
    with atomic_folder(Path(out)) as folder:
        name = f"model-{kind}.gguf"
        check_free_space(out, folder, sum(num_bytes(gguf, w) for w in weights.values()))
        write_file(gguf, folder / name, metadata, rope_factors(config), source, weights)
        check_file(gguf, folder / name, source, weights)
        text = modelfile(tokenizer, prompt, context, settings_of(trained), f"./{name}")
        (folder / "Modelfile").write_text(text)
        if trained:
            trained |= {"gguf": kind}
            (folder / TRAINED).write_text(json.dumps(trained, indent=1))
            write_card(folder, trained)
        for path in source.folder.glob("LICENSE*"):
            (folder / path.name).write_bytes(path.read_bytes())
    return Path(out) / name


def import_gguf():
    """The `gguf` package. Raises ConfigError where it is not installed."""
    try:
        import gguf  # late: only GGUF files need the package
    except ImportError as error:
        raise ConfigError(
            "--gguf: the package gguf is not installed: run ./launch.sh setup, or pip install gguf "
            "for the Python of LOOP_PYTHON"
        ) from error
    return gguf


# ---- what is read


def find_model(model: str) -> StoredBase:
    """The folder of a model that is Llama-shaped. Raises ConfigError for any other."""
    check_path("--model", model)
    folder = Path(model)
    if is_adapter(folder):
        raise ConfigError(
            f"--model {model}: is an adapter; merge it first: ./launch.sh merge --adapter {model} "
            "--out DIR"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {model}: has no config.json, so it is not a model's folder")
    source = find_base(model, None)
    named = source.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "unknown"
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"--model {model}: is a {architecture}; a GGUF file is written of "
            f"{' and '.join(ARCHITECTURES)} only"
        )
    return source


def read_trained(folder: Path) -> dict[str, Any]:
    """What trained.json says; {} where there is none, as in the folder of a plain base.

    Raises ConfigError where it is broken.
    """
    path = folder / TRAINED
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--model {folder}: {TRAINED} is broken ({type(error).__name__})"
        ) from error
    return found if isinstance(found, dict) else {}


def tensor_name(name: str) -> str:
    """The name in a GGUF file of a parameter of transformers. Raises ConfigError."""
    in_layer = {module: short for short, module in LAYER_MODULES.items()}
    outside = {module: short for short, module in OUTER_MODULES.items()}
    module, _, last = name.rpartition(".")
    match module.split(".", 3):
        case ["model", "layers", number, inner] if inner in in_layer and last == "weight":
            return f"blk.{number}.{in_layer[inner]}.weight"
    if module in outside and last == "weight":
        return f"{outside[module]}.weight"
    raise ConfigError(f"--gguf: {name} has no place in llama.cpp's Llama")


def shape_metadata(source: StoredBase, config) -> dict[str, Any]:
    """What a file says of the model's shape, by GGUF's keys.

    config: of transformers. Raises ConfigError for what llama.cpp's Llama has not.
    """
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    for key, value, known in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_type", rope_type, ("default", "llama3")),
        ("sliding_window", getattr(config, "sliding_window", None), (None,)),
    ):
        if value not in known:
            raise ConfigError(f"--model {source.name}: {key}={value} is not written to GGUF files")
    return {
        "general.name": source.folder.absolute().name,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_size(config),
        "llama.attention.value_length": head_size(config),
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": head_size(config),
        "llama.rope.freq_base": float(rope["rope_theta"]),
    }


def head_size(config) -> int:
    """The numbers that a head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config) -> torch.Tensor | None:
    """By what each rotary frequency is divided, fp32 [head_dim / 2]; None where by nothing.

    Llama 3.1 and its successors stretch the slow frequencies.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    exponents = torch.arange(0, head_size(config), 2).double() / head_size(config)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (rope["rope_theta"] ** -exponents / stretched.double()).float()


def read_weight(source: StoredBase, name: str) -> np.ndarray:
    """A weight in fp32; queries and keys have their rows in GGUF's order."""
    weight = source.read(name).float()
    num_heads = source.config["num_attention_heads"]
    if name.endswith("q_proj.weight"):
        weight = join_rotary_pairs(weight, num_heads)
    elif name.endswith("k_proj.weight"):
        num_heads = source.config.get("num_key_value_heads") or num_heads
        weight = join_rotary_pairs(weight, num_heads)
    return weight.numpy()


def join_rotary_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows of a query or key projection with the two rows of a rotary pair side by side.

    weight: [out, in] in transformers' order, which has the first rows of all pairs, then the second
    ones.
    """
    out_features, in_features = weight.shape
    halves = weight.reshape(num_heads, 2, out_features // num_heads // 2, in_features)
    return halves.transpose(1, 2).reshape(out_features, in_features)


# ---- what is written


def storage_of(source: StoredBase, name: str, kind: str) -> StoredTensor:
    """Vectors are fp32, and a row that blocks of Q8_0 do not fill is f16."""
    with safe_open(source.folder / source.files[name], "pt") as file:
        shape = tuple(file.get_slice(name).get_shape())
    if len(shape) == 1:
        return StoredTensor(tensor_name(name), "F32", shape)
    if kind == "q8_0" and shape[-1] % Q8_BLOCK == 0:
        return StoredTensor(tensor_name(name), "Q8_0", shape)
    return StoredTensor(tensor_name(name), "F16", shape)


def num_bytes(gguf, weight: StoredTensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[weight.kind]]
    return torch.Size(weight.shape).numel() // block * size


def write_file(
    gguf,
    path: Path,
    metadata: dict[str, Any],
    factors: torch.Tensor | None,
    source: StoredBase,
    weights: dict[str, StoredTensor],
) -> None:
    """Writes a GGUF file. weights: by their names in `source`; the others as computed above."""
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {weight.kind for weight in weights.values()}
    file_type = "MOSTLY_Q8_0" if "Q8_0" in kinds else "MOSTLY_F16"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        add_metadata(writer, key, value)
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, np.dtype("float32"), 4 * factors.numel())
    for weight in weights.values():
        kind = gguf.GGMLQuantizationType[weight.kind]
        size = num_bytes(gguf, weight)
        writer.add_tensor_info(weight.name, weight.shape, np.dtype("float32"), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name, weight in weights.items():
        numbers = read_weight(source, name)
        if weight.kind == "F16" and np.abs(numbers).max() > LARGEST_F16:
            raise ConfigError(f"--gguf: {name} holds a number above {LARGEST_F16:.0f}, f16's last")
        kind = gguf.GGMLQuantizationType[weight.kind]
        writer.write_tensor_data(gguf.quants.quantize(numbers, kind))
    writer.close()


def add_metadata(writer, key: str, value: Any) -> None:
    """Adds a value by the type that GGUF has for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def check_file(gguf, path: Path, source: StoredBase, weights: dict[str, StoredTensor]) -> None:
    """Reads a file again, and compares it with the weights.

    Raises ConfigError where a number is further off than rounding puts it.
    """
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in weights.items():
        tensor = written[weight.name]
        back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        expected = read_weight(source, name)
        error = np.abs(back - expected)
        if weight.kind == "Q8_0":
            # Half a step of a block, and the rounding of its scale to f16.
            largest = np.abs(expected).reshape(-1, Q8_BLOCK).max(1).repeat(Q8_BLOCK)
            allowed = (largest * (0.5 / 127 + 2**-10)).reshape(weight.shape) + 2**-17
        else:
            allowed = np.abs(expected) * 2**-11 + 2**-24
        if not (error <= allowed).all():
            raise ConfigError(
                f"--gguf: {weight.name} was not written as it is: {error.max():.1g} off"
            )
