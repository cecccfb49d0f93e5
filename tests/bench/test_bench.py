"""The benchmark: what it counts, and that it measures."""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from helpers import CPU, PYTHON, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

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


def test_the_jobs_rows_have_the_seeds_lengths(bench, tmp_path):
    job = runpy.run_path(str(BENCH / "job.py"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "loop" / "embedded" / "base")
    paths = job["make_rows"](tmp_path, tokenizer, {"train": 60, "valid": 2}, 2048)
    rows = [json.loads(line) for line in paths["train"].read_text().splitlines()]
    whole = [row["dialogue"] + row["soap"] for row in rows]
    lengths = [len(tokenizer(text)["input_ids"]) + job["FRAME"] for text in whole]
    notes = [len(tokenizer(row["soap"])["input_ids"]) for row in rows]
    assert len(rows) == 60 and rows[0]["soap"].startswith("S: ")
    assert np.mean(lengths) == pytest.approx(job["MEAN"], rel=0.1) and max(lengths) < 2048
    assert sum(notes) / sum(lengths) == pytest.approx(job["SUPERVISED"], abs=0.05)
    assert job["make_rows"](tmp_path, None, {"train": 60, "valid": 2}, 2048) == paths


def test_the_job_is_shown_part_by_part(bench):
    job = runpy.run_path(str(BENCH / "job.py"))
    parts = {"imports": 5.0, "first step": 1.0, "steps": 9.0, "audit": 1.0, "end": 0.5}
    measured = {
        "seconds": 16.5,
        "time": parts,
        "to_first_step": {"imports": 5.0, "first step": 1.0},
        "num_steps": 10,
        "tokens_per_second": 1000.0,
    }
    assert job["ratio"](measured) == pytest.approx(11.5 / 10)
    table = {
        line[:24].strip(): line[24:].split() for line in job["as_table"]([measured]).split("\n")
    }
    assert table["audit"] == ["1.0"] and table["first step after"] == ["6.0"]
    assert table["without start : steps"] == ["1.15"]


@pytest.mark.slow
def test_it_measures_the_whole_job(tmp_path):
    command = [str(ROOT / "launch.sh"), "bench", "--job", "--rounds", "1", "--rows", "24"]
    command += ["--base-dir", str(tmp_path), "--json", str(tmp_path / "job.json"), "max_steps=4"]
    env = os.environ | {"LOOP_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr[-2000:]
    [measured] = json.loads((tmp_path / "job.json").read_text())["jobs"]
    parts = measured["time"]
    assert sum(parts.values()) == pytest.approx(measured["seconds"])
    wanted = {"imports", "base", "engine", "steps", "evaluation", "sample notes", "audit"}
    assert all(parts[name] > 0 for name in wanted) and measured["num_steps"] == 4
    assert "in all" in out.stdout


@pytest.mark.parametrize("packed", [False, True])
def test_a_peers_tokens_are_counted_as_its_model_sees_them(bench, packed, monkeypatch, tmp_path):
    """TRL on a CPU: real tokens of each step, and rows that whole examples fill."""
    contenders = importlib.import_module("contenders")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contenders, "LONGEST", 64)
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 64, 200)
    examples = [
        SimpleNamespace(input_ids=np.full(n, 5 + i), labels=np.full(n, 5 + i))
        for i, n in enumerate(lengths)
    ]
    monkeypatch.setattr(contenders, "make_examples", lambda number, _: examples[:number])
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "loop" / "embedded" / "base")
    clock = contenders.Clock()
    spec = {"steps": 4, "micro": 4, "examples": 80, "vocab_size": 300}
    contenders.train_with_trl(
        spec, clock, model, tokenizer, packed=packed, gradient_checkpointing=False
    )
    assert len(clock.tokens) == 4
    if packed:  # 2 rows of 4 x 64 tokens a step; the random order may take the last, emptier row
        assert clock.micro_batch[0] == 1 and max(clock.tokens) <= 512
        assert np.median(clock.tokens) > 0.97 * 512
    else:
        assert clock.micro_batch[0] == 4 and sum(clock.tokens) == lengths[:32].sum()


@pytest.mark.parametrize("peer", ["llama", "trl:0", "unsloth:", "trl:x"])
def test_an_unknown_peer_is_one_line(bench, peer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--peer", peer])
    with pytest.raises(SystemExit, match="2"):
        bench["parse_args"]()
    assert f"and rows as in trl:8, not: {peer}" in capsys.readouterr().err


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


def test_the_floor_of_notes_counts_what_a_step_reads(bench):
    """TinyLlama's weights without the embedding, in 16 bits; 22,528 bytes of keys and values."""
    notes = sys.modules["notes"]
    args = argparse.Namespace(prompt=900, tokens=200)
    one, two = (notes.bytes_of_step("tinyllama", slots, args) for slots in (1, 2))
    assert two - one == 1000 * 22_528
    assert one - (two - one) == pytest.approx(2 * (1_100_048_384 - 32000 * 2048), rel=1e-3)


def test_notes_are_measured_by_the_engine(tmp_path):
    command = [str(ROOT / "launch.sh"), "bench", "--notes", "--slots", "2", "--prompt", "20"]
    command += ["--tokens", "8", "--peer-tokens", "4", "--json", str(tmp_path / "all.json")]
    env = os.environ | {"LOOP_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(
        command, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stdout + out.stderr[-2000:]
    results = json.loads((tmp_path / "all.json").read_text())
    measured = {name: found for name, found in results.items() if not name.endswith("compared")}
    assert measured.keys() == {
        "the engine, NF4 and LoRA, 2",
        "generate, NF4 and LoRA, 2",
        "generate on the merged copy, bf16, 2",
    }
    assert all(found["step_ms"] > 0 for found in measured.values())
    assert results.keys() - measured.keys() == {"NF4 and LoRA, compared", "merged, bf16, compared"}
