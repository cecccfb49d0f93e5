"""The corpus of hostile bases: each is the tiny base with one thing changed."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

PLANTED = "import pathlib; pathlib.Path('CODE_RAN').touch()\nraise SystemExit(77)\n"

TEMPLATES = {
    "divides by zero": "{{ 1 / 0 }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "eats memory": "{{ 'a' * 99999999999 }}",
    "eats memory slowly": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "a huge power": "{{ 10 ** (10 ** 9) }}",
    "renders nothing": "{% if false %}x{% endif %}",
    "ends in a surrogate": "{{ messages[0]['content'] }}{{ '\\ud800' }}",
    "no syntax": "{% for %}",
    "escapes the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads what is not there": "{{ messages[9]['content'] }}",
    "calls a text": "{{ 'x'() }}",
    "adds text and number": "{{ 'x' + 1 }}",
    "attribute of none": "{{ none.x.y }}",
    "a list": ["x"],
    "a number": 5,
    "formats": "{{ '%99999999999d' % 1 }}",
    "joins": "{{ range(99999) | join('x' * 999999) }}",
    "deep": "(" * 5000,
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.system('touch CODE_RAN') }}",
}
VALUES = ("three", -1, 0, 10_000_000, 2**40, 1.5, [], {}, True, "9" * 400, None)
COUNTS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
    "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim",
)  # fmt: skip
FIELDS = {
    "model_type a list": {"model_type": ["llama"]},
    "model_type unknown": {"model_type": "nothing"},
    "model_type a path": {"model_type": "../../x"},
    "model_type none": {"model_type": None},
    "rope a text": {"rope_scaling": "x", "rope_parameters": "x"},
    "rope of no kind": {"rope_scaling": {"rope_type": "nothing"}},
    "theta a text": {"rope_theta": "x"},
    "norm a text": {"rms_norm_eps": "x"},
    "activation of no kind": {"hidden_act": "nothing"},
    "activation a module": {"hidden_act": "os.system"},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "quantisation of no kind": {"quantization_config": {"quant_method": "nothing"}},
    "quantisation a text": {"quantization_config": "x"},
    "quantisation empty": {"quantization_config": {"a": 1}},
    "dtype of no kind": {"dtype": "nothing", "torch_dtype": "nothing"},
    "dtype a module": {"dtype": "os", "torch_dtype": "os"},
    "attention of no kind": {"_attn_implementation": "nothing"},
    "attention flash": {"_attn_implementation": "flash_attention_2"},
    "architectures a number": {"architectures": 5},
    "tie a text": {"tie_word_embeddings": "x"},
    "text_config a list": {"text_config": [1]},
    "a token id a text": {"eos_token_id": "x"},
    "token id beyond": {"eos_token_id": 10**12},
    "dropout a text": {"attention_dropout": "x"},
    "id2label a number": {"id2label": 5},
    "bias a text": {"attention_bias": "x"},
}
EMBEDDED_ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "stranger/other",
    "target_modules": ["q_proj"],
}
AUTO_MAP = {
    "AutoConfig": "code.C",
    "AutoModelForCausalLM": "code.M",
    "AutoTokenizer": ["code.T", None],
}
Change = Callable[[Path], None]


def edit(name: str, **values) -> Change:
    """A change of keys in a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | values))

    return change


def plant(name: str, **more) -> Change:
    """Code of the base's own, which a JSON file asks for."""

    def change(folder: Path) -> None:
        (folder / "code.py").write_text(PLANTED)
        edit(name, auto_map=AUTO_MAP, **more)(folder)

    return change


def template(text) -> Change:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        edit("tokenizer_config.json", chat_template=text)(folder)

    return change


def cut(name: str, keep: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return change


def flip(name: str, seed: int) -> Change:
    """A byte of a file's first 2,000 changed."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[random.Random(seed).randrange(min(len(data), 2000))] ^= 1 << (seed % 8)
        (folder / name).write_bytes(data)

    return change


def put(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


def index_of(file: str) -> Change:
    """An index that names `file` in place of the base's weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights")
        target = folder / Path(file).name
        target.write_bytes(b"\x80\x04cos\nsystem\n(S'touch CODE_RAN'\ntR.")
        names = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), file)
        index = json.dumps({"metadata": {}, "weight_map": names})
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch CODE_RAN'\ntR.")


def exploding_regex(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    split = {"Regex": "(a+a+)+b|(.*.*.*)+c"}
    pre = {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(tokenizer | {"pre_tokenizer": pre}))


def corpus() -> Iterator[tuple[str, Change]]:
    """(name, change of a copy of the tiny base) of each hostile base."""
    for name, text in TEMPLATES.items():
        yield f"template {name}", template(text)
    for name, values in FIELDS.items():
        yield f"config {name}", edit("config.json", **values)
    for key in COUNTS:
        for value in VALUES:
            yield f"config {key}={str(value)[:12]}", edit("config.json", **{key: value})
    yield "code in config.json", plant("config.json")
    yield "code in config.json, unknown kind", plant("config.json", model_type="stranger")
    yield "code in tokenizer_config.json", plant("tokenizer_config.json", tokenizer_class="T")
    yield "an adapter in it", put("adapter_config.json", json.dumps(EMBEDDED_ADAPTER))
    yield "index of .bin", index_of("pytorch_model-00001-of-00001.bin")
    yield "index outside", index_of("../outside.safetensors")
    yield "pickle only", pickle_only
    yield "regex", exploding_regex
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        for text in ("", "[]", "5", "null", "{", "[" * 100_000, '{"a": 1e999}', "\x00"):
            yield f"{name} is {text[:8]!r}", put(name, text)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        for keep in (0, 0.3, 0.99):
            yield f"{name} cut at {keep}", cut(name, keep)
        for seed in range(8):
            yield f"{name} bit {seed}", flip(name, seed)


def make(base: str, change: Change, folder: Path) -> Path:
    """A copy of the tiny base with a change."""
    shutil.copytree(base, folder)
    change(folder)
    return folder
