"""What is looked at in a stranger's base before a library reads it. All of it: tests/hostile."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loop.config.schema import ConfigError
from loop.untrusted import bases
from loop.untrusted.bases import INDEX, check_base_folder, read_model_config

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "base")
    return tmp_path / "base"


def change(base: Path, **values) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def name_file(base: Path, name: str) -> None:
    """The index has all weights in the file of this name, and such a file is there."""
    (base / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    shutil.copy(base / WEIGHTS, base / name)


def store_as(base: Path, dtype: torch.dtype) -> None:
    """All matrices of feed-forward blocks are stored in another type."""
    weights = load_file(base / WEIGHTS)
    changed = {name: w.to(dtype) if "mlp" in name else w for name, w in weights.items()}
    save_file(changed, base / WEIGHTS, {"format": "pt"})


FAULTS = {
    "model_type=None: must be the name": lambda base: change(base, model_type=None),
    "num_hidden_layers=0: must be a whole number": lambda base: change(base, num_hidden_layers=0),
    "vocab_size=3000000000: must be": lambda base: change(base, vocab_size=3 * 10**9),
    "names 9 layers, and the weights have 3": lambda base: change(base, num_hidden_layers=9),
    "vocab_size=321, and the embeddings are those of 320": lambda base: change(
        base, vocab_size=321
    ),
    "hidden_size=4,096, and the embeddings have 64": lambda base: change(base, hidden_size=4096),
    "99 attention heads in a hidden size of 64": lambda base: change(
        base, num_attention_heads=99, head_dim=None
    ),
    "names 'weights.bin': only safetensors are read": lambda base: name_file(base, "weights.bin"),
    "names 'weights.txt': only safetensors are read": lambda base: name_file(base, "weights.txt"),
    "lacks '../other.safetensors'": lambda base: name_file(base, "../other.safetensors"),
    "in pytorch_model.bin: only safetensors": lambda base: (base / WEIGHTS).rename(
        base / "pytorch_model.bin"
    ),
    f"{WEIGHTS} is damaged or cut off": lambda base: (base / WEIGHTS).write_bytes(b"\x09" * 99),
    "has *.safetensors, but neither": lambda base: (base / WEIGHTS).rename(
        base / "consolidated.safetensors"
    ),
    "is stored as codes, and config.json has no": lambda base: store_as(base, torch.int16),
    "config.json must hold one JSON object": lambda base: (base / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("words", FAULTS)
def test_what_is_no_models_is_named(base, words):
    check_base_folder("b", base)
    FAULTS[words](base)
    with pytest.raises(ConfigError) as refused:
        check_base_folder("b", base)
    assert words in str(refused.value) and str(refused.value).startswith("base=b: ")


def test_a_configuration_of_any_size_is_not_read(base, monkeypatch):
    monkeypatch.setattr(bases, "MOST_JSON_BYTES", 100)
    with pytest.raises(ConfigError, match="config.json is larger than 100 bytes"):
        check_base_folder("b", base)


def test_the_loop_chooses_the_attention_not_the_base(base):
    for name in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        change(base, **{name: "flash_attention_2"})
        config = read_model_config({"pretrained_model_name_or_path": str(base)}, None)
        assert config._attn_implementation is None and not hasattr(config, "attn_implementation")
