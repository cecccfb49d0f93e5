"""What the contenders are measured on: bases of real shapes, examples of the seed's lengths.

Both are random: the weights of a base and the tokens of an example.
"""

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
# The lengths of the seed's examples, in tokens. A note is about a quarter of its example.
MEAN, DEVIATION, LONGEST = 1463, 350, 2048
SUPERVISED = 0.27  # fraction of the tokens


def make_base(shape: str, folder: Path) -> Path:
    """The folder of a base in the hub's layout, with random weights and the embedded tokenizer.

    The next call finds it there.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = folder / shape
    if not (path / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], dtype="bfloat16")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if shape in IN_NF4:
            write_nf4(config, path, device)
        else:
            with torch.device(device):
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        torch.cuda.empty_cache()  # the contenders, which this process starts, shall find it empty
        AutoTokenizer.from_pretrained(ROOT / "loop" / "embedded" / "base").save_pretrained(path)
    return path


def write_nf4(config, path: Path, device: str) -> None:
    """Writes a base that is quantised already, as `NAME-bnb-4bit` on the hub.

    Each layer has a file, and no more than a layer is in memory.
    """
    import torch
    from bitsandbytes.nn import Params4bit
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from loop.kernels.quantization import QUANTIZATIONS

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    modules = model.model.named_modules(prefix="model")
    linear = {f"{name}.weight" for name, m in modules if isinstance(m, torch.nn.Linear)}
    path.mkdir(parents=True, exist_ok=True)
    files = {}
    parameters = dict(model.named_parameters())
    for part, names in groupby(parameters, key=lambda name: ".".join(name.split(".")[:3])):
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
                for key, tensor in value.quant_state.as_dict(packed=True).items():
                    tensors[f"{name}.{key}"] = tensor
                value = value.data
            tensors[name] = value.cpu()
        save_file(tensors, path / f"{part}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{part}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": files})
    (path / "model.safetensors.index.json").write_text(index)
    nf4 = QUANTIZATIONS["nf4"].transformers_config(torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = nf4.to_dict()
    config.save_pretrained(path)


def make_examples(
    number: int, vocab_size: int, seed: int = 0, length: int | None = None
) -> list[Example]:
    """Random examples of the seed's lengths, or all of one length."""
    rng = np.random.default_rng(seed)
    if length is None:
        lengths = np.clip(rng.normal(MEAN, DEVIATION, number), 64, LONGEST).astype(int)
    else:
        lengths = np.full(number, length)
    examples = []
    for i, tokens in enumerate(lengths):
        ids = rng.integers(3, vocab_size, tokens).astype(np.int32)
        labels = ids.copy()
        labels[: int(tokens * (1 - SUPERVISED))] = -100
        examples.append(Example(str(i), ids, labels))
    return examples
