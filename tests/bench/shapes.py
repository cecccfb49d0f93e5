"""What the contenders are measured on: bases with random weights in real shapes, and examples with the seed configuration's lengths."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np

from loop.data.tokenization import Example

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA = {
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES = {
    "tinyllama": LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama3-8b": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama3-70b": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "embedded": LLAMA
    | {
        "vocab_size": 4000,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
IN_NF4 = {"llama3-70b"}  # quantised when they are written: 39 GB instead of 141
# The lengths of the seed's set: mean 1,463, standard deviation 350, none above 2,048; a note is about a quarter of it.
MEAN, DEVIATION, LONGEST, SUPERVISED = 1463, 350, 2048, 0.27


def make_base(shape: str, folder: Path) -> Path:
    """A base with random weights in the hub's layout, with the embedded base's tokenizer; kept for the next call."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = folder / shape
    if not (path / "config.json").is_file():
        torch.manual_seed(0)
        config, device = (
            LlamaConfig(**SHAPES[shape], dtype="bfloat16"),
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        if shape in IN_NF4:
            write_nf4(config, path, device)
        else:
            with torch.device(device):
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        torch.cuda.empty_cache()  # this process goes on to start the contenders, who shall find the GPU empty
        AutoTokenizer.from_pretrained(ROOT / "loop" / "embedded" / "base").save_pretrained(path)
    return path


def write_nf4(config, path: Path, device: str) -> None:
    """A base as one gets it quantised already (`NAME-bnb-4bit` on the hub), a file for each layer; never is more than a layer in memory."""
    import torch
    from bitsandbytes.nn import Params4bit
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from loop.kernels.quantization import QUANTIZATIONS

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linear = {
        f"{name}.weight"
        for name, m in model.model.named_modules(prefix="model")
        if isinstance(m, torch.nn.Linear)
    }
    path.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, names in groupby(
        dict(model.named_parameters()), key=lambda name: ".".join(name.split(".")[:3])
    ):
        tensors = {}
        for name in names:
            shape = model.get_parameter(name).shape
            value = torch.full(shape, 1.0, dtype=torch.bfloat16, device=device)
            if len(shape) > 1:
                value.normal_(0, config.initializer_range)
            if name in linear:
                value = Params4bit(
                    value, requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16
                ).to(device)
                tensors |= {
                    f"{name}.{key}": t for key, t in value.quant_state.as_dict(packed=True).items()
                }
                value = value.data
            tensors[name] = value.cpu()
        save_file(tensors, path / f"{part}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{part}.safetensors")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    config.architectures, config.quantization_config = (
        ["LlamaForCausalLM"],
        QUANTIZATIONS["nf4"].transformers_config(torch.bfloat16).to_dict(),
    )
    config.save_pretrained(path)


def make_examples(
    number: int, vocab_size: int, seed: int = 0, length: int | None = None
) -> list[Example]:
    """Of the seed's lengths, or all of one length."""
    rng = np.random.default_rng(seed)
    lengths = (
        np.clip(rng.normal(MEAN, DEVIATION, number), 64, LONGEST).astype(int)
        if length is None
        else np.full(number, length)
    )
    examples = []
    for i, length in enumerate(lengths):
        ids = rng.integers(3, vocab_size, length).astype(np.int32)
        labels = ids.copy()
        labels[: int(length * (1 - SUPERVISED))] = -100
        examples.append(Example(str(i), ids, labels))
    return examples
