"""The benchmark: what it counts, and that it measures."""

import json
import os
import runpy
import subprocess
import sys

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from helpers import CPU, PYTHON, ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

BENCH = ROOT / "tests" / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    yield runpy.run_path(str(BENCH / "__main__.py"), run_name="bench")
    sys.path.remove(str(BENCH))


@pytest.mark.parametrize("shape", ["tinyllama", "llama3-8b", "llama3-70b", "embedded"])
def test_the_floor_counts_every_frozen_weight(bench, shape):
    sizes = bench["SHAPES"][shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    inner = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    head = model.lm_head.weight.numel()
    pairs = 6 * sizes["num_hidden_layers"] * sizes["hidden_size"] * bench["MEAN"]
    assert bench["flops_per_token"](sizes) == pytest.approx(4 * inner + 4 * 0.27 * head + pairs)
    assert shape != "tinyllama" or 4e9 < bench["flops_per_token"](sizes) < 5e9


def test_a_base_written_in_nf4_loads_as_one(bench, tmp_path, monkeypatch):
    shapes = sys.modules["shapes"]
    small = shapes.SHAPES["embedded"] | {"num_hidden_layers": 2}
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    monkeypatch.setattr(shapes, "IN_NF4", {"small"})
    base = shapes.make_base("small", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    four_bit = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(four_bit) == 2 * 7 and not any(name.startswith("lm_head") for name in four_bit)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
    dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert dense.float().std() == pytest.approx(0.02, rel=0.05)
    assert model.model.norm.weight.eq(1).all()


def test_the_examples_have_the_seeds_lengths(bench):
    examples = sys.modules["shapes"].make_examples(4000, 300)
    lengths = np.array([len(e) for e in examples])
    assert abs(lengths.mean() - 1450) < 20 and lengths.max() <= 2048 and 280 < lengths.std() < 350
    assert abs(sum(e.num_targets for e in examples) / lengths.sum() - 0.27) < 0.01


@pytest.mark.slow
def test_it_measures_the_loop_and_a_peer(tmp_path):
    """On a CPU; TRL and Unsloth need their packages, Unsloth a GPU."""
    options = "--shape embedded --steps 8 --rounds 1 --without-deepspeed --peer plain batch_size=1"
    command = [str(ROOT / "launch.sh"), "bench", *options.split()]
    command += ["--json", str(tmp_path / "all.json")]
    env = os.environ | CPU | {"LOOP_PYTHON": PYTHON}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr[-2000:]
    results = json.loads((tmp_path / "all.json").read_text())["results"]
    assert set(results) == {"the loop", "the loop without DeepSpeed", "plain"}
    assert all(min(run["tokens_per_second"]) > 0 for runs in results.values() for run in runs)
