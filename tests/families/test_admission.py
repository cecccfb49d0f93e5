"""What a base must be, asked of its configuration and its tokenizer alone."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, write_rows
from transformers.models.llama import modeling_llama

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_training_data
from loop.data.tokenization import PLAIN_TEMPLATE
from loop.families import isolation
from loop.families.admission import admit_base, check_lora_fits, check_vocabulary
from loop.model.loading import load_base, load_model_config, load_tokenizer

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
}


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy without weights, and a way to change its files."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def change(file="config.json", **values):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return str(folder)

    return change


def configure(base: str, tmp_path, *words: str):
    rows = write_rows(tmp_path / "rows.jsonl", "row", 12, 5)
    words = (f"base={base}", f"data.train={rows}", f"run.dir={tmp_path}", *words)
    return load_config(["--config", "loop/configs/embedded.yaml", *WITHOUT_SPLITS, *words])


WITHOUT_SPLITS = (
    "data.valid=null",
    "data.valid_fraction=0",
    "data.test=null",
    "data.headings=optional",
    "monitor.sample_notes=[]",
    "data.columns={id: id, dialogue: dialogue, note: soap}",
)
TOKENS = {"row-7": [1, 5, 2]}


def refusal(config) -> str:
    with pytest.raises(ConfigError) as error:
        _, model_config = admit_base(config)
        check_vocabulary(config.base, model_config, TOKENS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_base_is_refused_without_its_weights(base, tmp_path):
    tokenizer, model_config = admit_base(configure(base(), tmp_path))
    assert tokenizer.model_max_length == model_config.max_position_embeddings
    check_vocabulary("base", model_config, TOKENS)
    admit_base(configure(base(rope_parameters=LONGROPE), tmp_path, "max_seq_len=256"))
    config = configure(base(rope_parameters=LONGROPE), tmp_path, "max_seq_len=512")
    assert "set max_seq_len=256" in refusal(config)
    config = configure(base(rope_parameters=None, vocab_size=5, pad_token_id=0), tmp_path)
    assert "id row-7 has token 5" in refusal(config)
    words = "lora={r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [lm_head]}"
    assert "lora.lora_dropout: must be 0" in refusal(
        configure(base(vocab_size=320), tmp_path, words)
    )
    admit_base(configure(base(), tmp_path, words.replace("0.1", "0.0")))
    words = "lora={r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: [nothing]}"
    assert "lora: " in refusal(configure(base(), tmp_path, words))
    for pattern, kind in (
        (".*", "LlamaModel"),
        (".*mlp.*", "LlamaMLP"),
        (".*norm", "LlamaRMSNorm"),
    ):
        refused = refusal(configure(base(), tmp_path, f"lora.target_modules={pattern}"))
        assert f"lora.target_modules: {pattern!r} fits a {kind} too, which gets no LoRA" in refused


WRONG = {  # a change of the configuration: what is said of weights that stay as they were
    "mlp_bias=True": "lack model.layers.0.mlp.down_proj.bias and 8 more, which config.json asks",
    "model_type='qwen3'": "lack model.layers.0.self_attn.k_norm.weight and 5 more",
    "num_key_value_heads=1": "k_proj.weight as [16, 64], and stored is [32, 64]",
    "intermediate_size=96": "mlp.gate_proj.weight as [96, 64], and stored is [128, 64]",
    "pad_token_id=320": "pad_token_id=320, and the vocabulary has 320",
    "dtype='float8_e4m3fn'": "dtype='float8_e4m3fn': must be float32",
    "quantization_config={'quant_method': 'fp8'}": "is stored quantised (fp8)",
    "quantization_config={'bits': 4}": "quantised (by a method that its config.json does not name)",
    "quantization_config={'quant_method': 'bitsandbytes', 'load_in_8bit': True}": "es, 8 bits)",
}


@pytest.mark.parametrize("change", WRONG)
def test_weights_of_another_model_are_refused_by_their_headers(base, tiny_base, tmp_path, change):
    folder = base(**eval(f"dict({change})"))
    for path in ROOT.__class__(tiny_base).glob("*.safetensors"):
        shutil.copy(path, folder)
    assert WRONG[change] in refusal(configure(folder, tmp_path))


def test_a_folder_without_a_tokenizer_says_so(base, tmp_path):
    folder = base()
    for path in ROOT.__class__(folder).glob("tokenizer*"):
        path.unlink()
    assert "the folder has no tokenizer (tokenizer.json" in refusal(configure(folder, tmp_path))


def test_wishes_of_a_base_for_its_output_do_not_count(base, tiny_base, tmp_path):
    folder = base(return_dict=False, output_attentions=True)
    for path in ROOT.__class__(tiny_base).glob("*.safetensors"):
        shutil.copy(path, folder)
    (ROOT.__class__(folder) / "generation_config.json").write_text('{"max_new_tokens": 0}')
    admit_base(configure(folder, tmp_path))
    model = load_base(folder, torch.float32, "cpu", quantization=None)
    assert model(torch.zeros(1, 2, dtype=torch.int64)).logits.shape[-1] == 320


def test_overlong_applies_at_the_bases_context_where_that_is_smaller(base, tmp_path):
    config = configure(base(max_position_embeddings=400), tmp_path, "max_seq_len=1024")
    data = load_training_data(config, load_tokenizer(config.base))
    assert data.reports["train"].dropped and data.lengths.max() <= 400
    stop = configure(config.base, tmp_path, "max_seq_len=1024", "data.overlong=error")
    with pytest.raises(ConfigError, match="more than the base's context of 400 tokens"):
        load_training_data(stop, load_tokenizer(stop.base))


def test_a_tokenizer_without_an_end_is_refused_and_the_plain_template_begins_as_it_does(base):
    folder = base("tokenizer_config.json", chat_template=None)
    path = ROOT.__class__(folder) / "chat_template.jinja"
    path.unlink()
    assert load_tokenizer(folder).chat_template == PLAIN_TEMPLATE
    tokenizer = json.loads((path.parent / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (path.parent / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(folder).chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    base("tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(folder)


def test_names_of_sizes_that_families_have_of_their_own(tmp_path, base):
    opt = {"model_type": "opt", "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 96}
    (tmp_path / "config.json").write_text(json.dumps(opt))
    model_config = load_model_config(str(tmp_path))
    assert (model_config.head_dim, model_config.intermediate_size) == (16, 96)
    assert load_tokenizer(base(max_position_embeddings=77)).model_max_length == 77
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 77}
    for rope, length in (({"rope_theta": 1e4} | yarn, 308), (LONGROPE, 256), (None, 1000)):
        folder = base(max_position_embeddings=77 if length == 308 else 1000, rope_parameters=rope)
        assert load_tokenizer(folder).model_max_length == length


def test_a_link_to_the_entry_finds_its_folder(tmp_path):
    (tmp_path / "x").symlink_to(ROOT / "launch.sh")
    done = subprocess.run([tmp_path / "x", "plan", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--gpus" in done.stdout, done.stderr


def test_the_last_token_has_an_embedding_and_the_next_has_none():
    model_config = SimpleNamespace(vocab_size=5)
    check_vocabulary("b", model_config, {"row-1": [0, 4]})
    with pytest.raises(ConfigError, match="id row-2 has token 5"):
        check_vocabulary("b", model_config, {"row-1": [0, 4], "row-2": [5, 0]})


class Doubled(torch.nn.Linear):
    """More than a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class MoreThanLinear(modeling_llama.LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.down_proj = Doubled(config.intermediate_size, config.hidden_size, bias=False)


class ReadsItsWeight(modeling_llama.LlamaMLP):
    def forward(self, x):
        return torch.nn.functional.linear(self.up_proj(x), self.down_proj.weight)


def test_linear_layers_that_quantisation_would_take_for_others_are_refused(
    base, tmp_path, monkeypatch
):
    """What computes more than a product; what reads a weight that will be a code."""
    monkeypatch.setattr(modeling_llama, "LlamaMLP", MoreThanLinear)
    for method in ("qlora", "lora"):
        config = configure(base(), tmp_path, f"method={method}")
        with pytest.raises(ConfigError, match="Doubled is more than a linear layer"):
            isolation.check_isolation(config)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", ReadsItsWeight)
    with pytest.raises(ConfigError, match="reads the weights of its linear layers itself"):
        isolation.check_isolation(configure(base(), tmp_path, "method=qlora"))
    isolation.check_isolation(configure(base(), tmp_path, "method=lora"))


def test_packed_documents_must_agree_within_a_thousandth(tiny_base, monkeypatch):
    """Losses in nats, gradients relative to the plain ones."""
    config = load_model_config(tiny_base, None)

    def difference() -> str:
        return isolation.run_copy(config, 256)[1]

    assert difference() == ""
    alone, gradients_of = isolation.losses_alone, isolation.gradients_of
    monkeypatch.setattr(isolation, "losses_alone", lambda *args: alone(*args) + 0.005)
    assert difference().startswith("losses differ by 0.005 nats")
    monkeypatch.setattr(isolation, "losses_alone", alone)
    factors = itertools.cycle([1.0, 1.02])  # of the packed row, of the documents alone
    monkeypatch.setattr(
        isolation,
        "gradients_of",
        lambda *args: torch._foreach_mul(gradients_of(*args), next(factors)),
    )
    assert difference().startswith("gradients are 2% off")


@pytest.mark.parametrize(
    "word",
    [
        "lora.rank_pattern={nothing: 4}",
        "lora.alpha_pattern={lm_head: 4}",
        "lora.target_modules=[q_proj, nothing]",
        "lora.exclude_modules=[nothing]",
        "lora.modules_to_save=[nothing]",
    ],
)
def test_names_of_lora_that_fit_no_module_are_refused(base, tmp_path, word):
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}: .* fits no module"):
        check_lora_fits(configure(base(), tmp_path, word))


def test_layers_of_lora_are_those_of_the_whole_base(base, tmp_path):
    some = "lora.target_modules=[q_proj]"
    check_lora_fits(configure(base(), tmp_path, some, "lora.layers_to_transform=[2]"))
    with pytest.raises(ConfigError, match="layers_to_transform: '9' fits no module"):
        check_lora_fits(configure(base(), tmp_path, some, "lora.layers_to_transform=[2, 9]"))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"hidden_act": "sulu"}, "config.json: hidden_act='sulu': is no name that transformers"),
        ({"hidden_size": []}, "config.json: Field 'hidden_size' expected int, got list: correct"),
        ({"tie_word_embeddings": "x"}, "config.json: Field 'tie_word_embeddings' expected bool"),
        ({"layer_types": ["y"]}, "config.json: The `layer_types` entries must be in"),
    ],
)
def test_a_wrong_value_of_a_configuration_is_named_with_its_key(base, tmp_path, values, said):
    with pytest.raises(ConfigError) as error:
        admit_base(configure(base(**values), tmp_path))
    assert said in str(error.value) and "take another base" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_size_that_a_configuration_lacks_is_named(tiny_base, tmp_path, size):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    values = json.loads((folder / "config.json").read_text())
    del values[size]
    (folder / "config.json").write_text(json.dumps(values))
    said = rf"config\.json does not say {size}=\d+, which transformers assumes"
    with pytest.raises(ConfigError, match=said):
        admit_base(configure(str(folder), tmp_path))


OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_template_is_found_wherever_bases_keep_it(base, tmp_path):
    folder = Path(base())
    for path in folder.glob("chat_template*"):
        path.unlink()
    assert load_tokenizer(str(folder)).chat_template.endswith(PLAIN_TEMPLATE)
    legacy = folder / "chat_template.json"
    legacy.write_text(json.dumps({"chat_template": OTHER_TEMPLATE}))
    assert load_tokenizer(str(folder)).chat_template == OTHER_TEMPLATE
    for broken in ("{", "[]", "{}", '{"chat_template": 3}'):
        legacy.write_text(broken)
        with pytest.raises(ConfigError, match=r"chat_template\.json"):
            load_tokenizer(str(folder))
    legacy.unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    with pytest.raises(ConfigError, match='templates tool_use, and none named "default"'):
        load_tokenizer(str(folder))
    (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    assert load_tokenizer(str(folder)).chat_template == OTHER_TEMPLATE


def test_a_folder_or_file_that_is_no_model_says_what_to_name(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "whole" / "inner")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    for name, said in (
        ("whole", ": name its folder inner, which has one"),
        ("adapter", f": it is an adapter; name it as adapter={tmp_path / 'adapter'}, and the"),
        ("model.Q4.gguf", "is a file; give a folder in the hub's layout"),
    ):
        with pytest.raises(ConfigError) as error:
            load_tokenizer(str(tmp_path / name))
        assert said in str(error.value)
