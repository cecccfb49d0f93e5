"""A Llama in a GGUF file becomes a folder in the hub's layout.

GGUF is llama.cpp's file format: quantised weights, configuration and tokenizer in one file.
transformers reads it, but keeps the weights packed and does not save them (seen with 5.23). So the
weights are unpacked here and stored in bf16. What quantisation lost stays lost: the result
approximates the model that the file was made from.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..config.schema import ConfigError

Metadata = dict[str, Any]  # by GGUF's keys, such as "llama.block_count"

# What is not in a layer.
OUTER_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",  # absent where it is the embedding
}
# `blk.N.NAME.weight` in a file is `model.layers.N.MODULE.weight` in transformers.
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # a token's type in a file: it is matched before text is split
DTYPE = torch.bfloat16


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes the model in a GGUF file to `folder`, which is created, in the hub's layout.

    Needs the `gguf` package. Raises ConfigError for what is not a Llama with SmolLM's tokenizer.
    """
    metadata, tensors = read_gguf(path)
    model = build_model(metadata, tensors)
    model.save_pretrained(folder)
    build_tokenizer(metadata).save_pretrained(folder)


# ---- the file


def read_gguf(path: Path) -> tuple[Metadata, Iterator[tuple[str, torch.Tensor]]]:
    """The metadata of a GGUF file, and its tensors by name, fp32 [out, in] or [out]."""
    from gguf import GGUFReader, dequantize  # late: only this conversion needs the package

    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = (
        (tensor.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
        for tensor in reader.tensors
    )
    return metadata, tensors


# ---- weights


def build_model(
    metadata: Metadata, tensors: Iterable[tuple[str, torch.Tensor]]
) -> LlamaForCausalLM:
    """The model with the tensors of a file, in bf16 and on the CPU.

    Raises ConfigError for another architecture, and where a tensor is missing or unknown.
    """
    if metadata["general.architecture"] != "llama":
        raise ConfigError(f"the GGUF file holds no Llama: {metadata['general.architecture']}")
    config = build_config(metadata)
    state = {}
    for name, tensor in tensors:
        if name.endswith("attn_q.weight"):
            tensor = split_rotary_pairs(tensor, config.num_attention_heads)
        elif name.endswith("attn_k.weight"):
            tensor = split_rotary_pairs(tensor, config.num_key_value_heads)
        state[parameter_name(name)] = tensor.to(DTYPE)
    config.tie_word_embeddings = "lm_head.weight" not in state
    # Not `.to(DTYPE)`, which would round the rotary frequencies as well.
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, trust_remote_code=False)
    # An output layer that is the embedding has no tensor of its own.
    missing = set(model.state_dict()) - set(state) - {"lm_head.weight"}
    if missing:
        raise ConfigError(f"the GGUF file lacks {len(missing)} tensors, such as {min(missing)}")
    model.load_state_dict(state, strict=False)
    # Only the ids of special tokens: no sampling, no penalties, nothing that would change how a
    # note is written.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def build_config(metadata: Metadata) -> LlamaConfig:
    """The transformers configuration that a file's metadata describes."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        # The file has it as fp32, in which 1e-5 is 0.00000999999975.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        max_position_embeddings=metadata["llama.context_length"],
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype=DTYPE,
    )


def parameter_name(name: str) -> str:
    """The parameter's name in transformers for a tensor's name in a file. Raises ConfigError."""
    match name.split("."):
        case ["blk", number, layer_name, "weight"] if layer_name in LAYER_MODULES:
            return f"model.layers.{number}.{LAYER_MODULES[layer_name]}.weight"
        case [outer_name, "weight"] if outer_name in OUTER_MODULES:
            return f"{OUTER_MODULES[outer_name]}.weight"
    raise ConfigError(f"the GGUF file has an unknown tensor: {name}")


def split_rotary_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows of a query or key projection in transformers' order. weight: [out, in].

    Rotary embeddings turn pairs of rows of a head. GGUF has the two rows of a pair side by side
    (0 1, 2 3, ...); transformers has the first rows of all pairs, then the second ones.
    """
    out_features, in_features = weight.shape
    pairs = out_features // num_heads // 2
    by_pair = weight.reshape(num_heads, pairs, 2, in_features)
    return by_pair.transpose(1, 2).reshape(out_features, in_features)


# ---- tokenizer


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer that a file's metadata describes: GPT-2's byte-level BPE, digits one by one.

    Raises ConfigError for one that splits text in another way.
    """
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"the GGUF file has an unknown tokenizer: {' '.join(kind)}")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # Digits are taken out first. So two spaces before a digit are one token, as in pre-training; by
    # the second step alone the last of them would go to the digit. No merge joins digits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control_tokens = [token for token, kind in zip(tokens, types) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control_tokens]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
