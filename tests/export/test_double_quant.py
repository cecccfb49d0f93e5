"""A run with double_quant=false: its adapter is merged and audited on the base that it had."""

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from loop.export.merge import merge
from loop.export.standalone_loss import load
from loop.kernels.quantization import QUANTIZATIONS


@pytest.fixture
def adapter(trained, tmp_path):
    """The trained adapter, whose trained.json says that the scales were not quantised."""
    folder = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    said = json.loads((folder / "trained.json").read_text())
    (folder / "trained.json").write_text(json.dumps(said | {"double_quant": False}))
    return folder


def test_the_standalone_process_loads_the_base_as_it_was(trained, adapter):
    for folder, nested in ((trained / "adapter", True), (adapter, False)):
        model = load(str(folder), "cpu")
        layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert layers and {layer.weight.quant_state.nested for layer in layers} == {nested}


def test_the_merged_weights_come_from_scales_that_were_not_quantised(adapter, tiny_base, tmp_path):
    folder = merge(str(adapter), str(tmp_path / "merged"), into="nf4")
    name = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(f"{tiny_base}/model.safetensors")[name].to(torch.bfloat16)
    weights = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.{name.removesuffix('.weight')}"
    a, b = (
        next(t.float() for n, t in weights.items() if key.split(".", 1)[1] in n and part in n)
        for part in ("lora_A", "lora_B")
    )
    expected = {
        double: (QUANTIZATIONS["nf4"].round_trip(base, double).float() + 2.0 * (b @ a)).bfloat16()
        for double in (True, False)
    }
    merged = load_file(folder / "model.safetensors")[name]
    distance = {double: (merged - e).float().norm().item() for double, e in expected.items()}
    assert distance[False] < 0.1 * distance[True], distance
