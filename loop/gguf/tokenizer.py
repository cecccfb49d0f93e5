"""A tokenizer of transformers as GGUF's metadata, where llama.cpp has the same one.

llama.cpp knows byte-level BPE (GPT-2's kind) with one of a list of ways to split a text before, by
name, and SentencePiece's BPE, which splits nothing. Which name is right is found by trying: with it
a sample must give the tokenizer's own tokens.
"""

import json
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers

from ..config.schema import ConfigError
from ..data.soap import soap_messages
from ..data.tokenization import render

# A token's type in a file.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Splitting(NamedTuple):
    """How llama.cpp splits a text before the merges."""

    patterns: tuple[str, ...]  # one after the other
    whole_words: bool = False  # a part that is a token is taken without merges


SPLITTINGS = {  # by the name that llama.cpp has for it
    "llama-bpe": Splitting((CONTRACTIONS + WORDS % "{1,3}",), whole_words=True),
    "qwen2": Splitting((CONTRACTIONS + WORDS % "",)),
    "smollm": Splitting((r"\p{N}", GPT2)),
    "gpt-2": Splitting((GPT2,)),
}
# What splittings differ in: numbers, contractions, spaces, line breaks, other alphabets.
SAMPLE = (
    "Doctor: It's 142/88, isn't it? I'LL take 2,500 mg\n\nPatient: no...  two  spaces;\ttab\r\n"
    " — naïve 37.8°C, 日本 ½ (p<0.05) A1c\n \n  S: done "
)
# The same for texts that have one space or line break between two words.
PLAIN_SAMPLE = (
    "Doctor: It's 142/88, isn't it? I take 2,500 mg\nPatient: no... 37.8 °C (p<0.05) A1c\n"
)


def tokenizer_metadata(tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a file says of a tokenizer, by GGUF's keys. Raises ConfigError where it can't say it.

    A beginning-of-sequence token is added by llama.cpp where the training's prompt begins with one.

    vocab_size: rows of the embedding; rows without a token become unused ones.
    """
    fast = tokenizer.backend_tokenizer
    saved = json.loads(fast.to_str())
    model = saved["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"--gguf: llama.cpp has no such tokenizer: {model['type']}")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    tokens, types = token_list(tokenizer, saved, vocab_size)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": begins_with_bos(tokenizer),
        "tokenizer.ggml.add_eos_token": False,
    }
    if model.get("byte_fallback"):
        metadata |= sentencepiece_metadata(tokens, merges)
    else:
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": splitting_name(fast, saved),
            "tokenizer.ggml.merges": merges,
        }
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    metadata |= {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items() if v is not None}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def token_list(tokenizer, saved: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """The spelling and the type of each token. saved: the content of tokenizer.json."""
    by_id = {number: token for token, number in saved["model"]["vocab"].items()}
    added = {token["id"]: token for token in saved["added_tokens"]}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= vocab_size:
        raise ConfigError(
            f"--gguf: the tokenizer has {max(by_id) + 1} tokens, the model {vocab_size}"
        )
    tokens = []
    types = []
    for number in range(vocab_size):
        token = by_id.get(number)
        tokens.append(f"[UNUSED{number}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif number == tokenizer.unk_token_id and saved["model"].get("byte_fallback"):
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        elif saved["model"].get("byte_fallback") and is_byte(token):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    return tokens, types


def is_byte(token: str) -> bool:
    """Whether it stands for one byte, as "<0x0A>" does."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def begins_with_bos(tokenizer) -> bool:
    """Whether the prompt of the training begins with the beginning-of-sequence token."""
    if not tokenizer.bos_token:
        return False
    return render(tokenizer, soap_messages("x"), True).startswith(tokenizer.bos_token)


def sentencepiece_metadata(tokens: list[str], merges: list[str]) -> dict[str, Any]:
    """SentencePiece's kind: the merge that makes the token with the highest score comes first."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(rank.get(token, 0)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": True,
    }


def splitting_name(fast: Tokenizer, saved: dict) -> str:
    """llama.cpp's name for how this tokenizer splits a text.

    The second best is one that differs in runs of spaces alone. Raises ConfigError where there is
    none.
    """
    for sample in (SAMPLE, PLAIN_SAMPLE):
        expected = fast.encode(sample, add_special_tokens=False).ids
        for name, splitting in SPLITTINGS.items():
            candidate = as_llama_cpp(saved, splitting)
            if candidate.encode(sample, add_special_tokens=False).ids == expected:
                return name
    raise ConfigError(
        "--gguf: the tokenizer splits a text in a way that is not known here to be one of "
        f"llama.cpp's, so other tokens would come out (known: {', '.join(SPLITTINGS)})"
    )


def as_llama_cpp(saved: dict, splitting: Splitting) -> Tokenizer:
    """The same vocabulary and merges behind another splitting."""
    model = saved["model"] | {"ignore_merges": splitting.whole_words}
    fast = Tokenizer.from_str(json.dumps(saved | {"model": model, "normalizer": None}))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return fast
