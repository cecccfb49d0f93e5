"""A GGUF file holds the model that was trained: its weights, its tokens, its prompt.

llama.cpp itself is not run here. The file is read by the project's own reader, which was written
for files of others.
"""

import json

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from loop.commands import export
from loop.config.schema import ConfigError
from loop.export.card import write_papers
from loop.generation.prompt import describe_prompt
from loop.gguf.reader import build_model, read_gguf, split_rotary_pairs
from loop.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPLITTINGS,
    UNKNOWN,
    splitting_name,
    tokenizer_metadata,
)
from loop.gguf.writer import export_gguf, join_rotary_pairs, rope_factors

gguf = pytest.importorskip("gguf")
EMBEDDED = str(ROOT / "loop" / "embedded" / "base")


@pytest.fixture
def untied(tmp_path):
    """A merged model's folder: random weights, an output layer of its own, the embedded tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # rows without a token
        hidden_size=48,  # a row of 48 holds no whole number of Q8_0's blocks
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    folder = tmp_path / "merged"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {"base": EMBEDDED, "max_seq_len": 512, "prompt": describe_prompt(tokenizer)}
    write_papers(folder, said | {"merged_into": "nf4"})
    return folder


@torch.no_grad()
def logits_of(model, ids):
    return model.eval().float()(ids).logits


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-6), ("q8_0", 0.02)])
def test_the_file_gives_the_logits_of_the_model(untied, tmp_path, kind, most):
    path = export_gguf(str(untied), str(tmp_path / "out"), kind)
    metadata, tensors = read_gguf(path)
    back = build_model(metadata, tensors)
    model = AutoModelForCausalLM.from_pretrained(untied)
    ids = torch.randint(0, 2048, (2, 40))
    expected, found = logits_of(model, ids), logits_of(back, ids)
    assert (found - expected).norm() / expected.norm() < most
    assert back.lm_head.weight is not back.model.embed_tokens.weight
    state, kinds = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        state[tensor.name], kinds[tensor.name] = tensor, tensor.tensor_type.name
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["blk.0.attn_q.weight"] == "F16"
    # Its rows have 64 numbers, those of the others 48.
    assert kinds["blk.1.ffn_down.weight"] == ("Q8_0" if kind == "q8_0" else "F16")
    assert metadata["llama.rope.freq_base"] == 500000.0


def test_beside_the_file_lie_a_modelfile_and_a_card_with_the_prompt(untied, tmp_path, capsys):
    export.main(["--model", str(untied), "--gguf", "f16", "--out", str(tmp_path / "out")])
    assert "model-f16.gguf" in capsys.readouterr().out
    folder = tmp_path / "out"
    modelfile = (folder / "Modelfile").read_text()
    assert "FROM ./model-f16.gguf\n" in modelfile and "PARAMETER num_ctx 512\n" in modelfile
    assert "{{ .Prompt }}" in modelfile
    card = (folder / "README.md").read_text()
    assert "llama-server --jinja -m model-f16.gguf -c 512" in card and "library_name: gguf" in card
    assert "from_pretrained" not in card
    assert json.loads((folder / "trained.json").read_text())["gguf"] == "f16"


def test_the_embedded_tokens_and_their_types_are_in_the_file():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    metadata = tokenizer_metadata(tokenizer, len(tokenizer) + 1)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[:-1] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = metadata["tokenizer.ggml.token_type"]
    assert types[tokenizer.bos_token_id] == CONTROL and types[-2] == NORMAL != types[-1]
    # Its template writes the beginning of the sequence: llama.cpp must add it where nobody does.
    begins = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    ).startswith(tokenizer.bos_token)
    assert metadata["tokenizer.ggml.add_bos_token"] == begins
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_splitting_is_found_by_its_tokens():
    """Digits one by one, three by three, GPT-2's; another one has no name."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    # Merges that join digits and spaces, so that each splitting gives other tokens.
    vocab = saved["model"]["vocab"]
    more = [("1", "4"), ("14", "2"), ("2", "5"), ("Ġ", "Ġ"), ("Ġ", "2"), ("Ċ", "Ċ"), ("Ġ", "P")]
    for first, second in more:
        if first + second not in vocab:
            vocab[first + second] = len(vocab) + 1000
        if [first, second] not in saved["model"]["merges"]:
            saved["model"]["merges"].append([first, second])
    for name, splitting in SPLITTINGS.items():
        fast = Tokenizer.from_str(json.dumps(saved))
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(p), "isolated") for p in splitting.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        assert splitting_name(fast, saved) == name
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    with pytest.raises(ConfigError, match="splits a text.*known: llama-bpe"):
        splitting_name(fast, saved)


def test_sentencepieces_merges_become_scores():
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "bb"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "ab"), ("b", "b")]
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )  # fmt: skip
    metadata = tokenizer_metadata(tokenizer, len(pieces))
    assert metadata["tokenizer.ggml.model"] == "llama"
    scores = dict(zip(pieces, metadata["tokenizer.ggml.scores"]))
    assert scores["ab"] > scores["▁ab"] > scores["bb"]
    assert metadata["tokenizer.ggml.token_type"] == [UNKNOWN, CONTROL, CONTROL, BYTE] + [NORMAL] * 6
    assert metadata["tokenizer.ggml.add_bos_token"] is True


def test_the_factors_of_llama_3_1_stretch_the_slow_frequencies():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = rope_factors(
        LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    )
    assert factors.shape == (64,) and factors[0] == 1 and factors[-1] == pytest.approx(8)
    assert (factors.diff() > -1e-5).all()
    assert rope_factors(LlamaConfig(hidden_size=512)) is None


def test_rows_of_a_rotary_pair_are_put_side_by_side():
    weight = torch.randn(48, 7)
    assert join_rotary_pairs(torch.arange(8.0)[:, None], 1).ravel().tolist() == [
        *(0, 4, 1, 5, 2, 6, 3, 7)
    ]
    for heads in (1, 2, 6):
        assert torch.equal(split_rotary_pairs(join_rotary_pairs(weight, heads), heads), weight)


def test_what_llama_cpp_has_not_is_refused_in_one_line(untied, trained, tmp_path, capsys):
    config = Qwen2Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "qwen")
    said = json.loads((untied / "config.json").read_text())
    for name, changes in {"act": {"hidden_act": "gelu"}, "big": {"vocab_size": 8}}.items():
        (tmp_path / name).mkdir()
        for path in untied.iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        (tmp_path / name / "config.json").write_text(json.dumps(said | changes))
    for model, says in (
        (tmp_path / "qwen", "Qwen2ForCausalLM"),
        (trained / "adapter", "merge it first"),
        (tmp_path / "nowhere", "no config.json"),
        (tmp_path / "act", "hidden_act=gelu"),
        (tmp_path / "big", "vocab_size=8"),
    ):
        with pytest.raises(SystemExit) as caught:
            export.main(["--model", str(model), "--gguf", "f16", "--out", str(tmp_path / "o")])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and says in err and err.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_vectors_are_fp32_and_rows_that_fill_no_block_are_f16(untied, tmp_path):
    path = export_gguf(str(untied), str(tmp_path / "out"), "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == "F16"  # rows of 48
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"  # rows of 64


def test_a_number_that_f16_has_not_is_named_and_nothing_is_left(untied, tmp_path):
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"][3, 4] = 1e5
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lm_head.weight holds a number above 65504"):
        export_gguf(str(untied), str(tmp_path / "out"), "f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_file_that_is_a_percent_off_is_not_kept(untied, tmp_path, monkeypatch, kind):
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda x, kind: quantize(1.01 * x, kind))
    with pytest.raises(ConfigError, match="was not written as it is"):
        export_gguf(str(untied), str(tmp_path / "out"), kind)
    assert not (tmp_path / "out").exists()
