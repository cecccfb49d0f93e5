"""The figures of a split, and that the saved adapter is the model that was trained."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_ok, run_ranks

from loop.cli import load_config
from loop.data import load_examples
from loop.model import load_tokenizer

STRANGER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base, adapter, rows = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": "cpu"})
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter).eval()
AutoTokenizer.from_pretrained(adapter)
total = count = 0
for ids, labels in json.load(open(rows)):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    labels = torch.tensor(labels[1:])
    total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
    count += (labels != -100).sum().item()
assert "loop" not in sys.modules
print(total / count)
"""


def held_out(trained):
    config = load_config(["--config", str(trained / "config.yaml")])
    return config, load_examples(config, load_tokenizer(config.base), "valid")[0]


def test_a_process_that_never_heard_of_this_project_gets_the_same_loss(trained, tmp_path):
    config, examples = held_out(trained)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([(e.input_ids.tolist(), e.labels.tolist()) for e in examples]))
    command = [sys.executable, "-c", STRANGER, config.base, str(trained / "adapter"), str(rows)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((trained / "report.json").read_text())
    assert float(done.stdout) == pytest.approx(report["eval/loss"], rel=5e-3)  # bf16, and one document a row instead of packed
    before = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][0]["eval/loss"]
    assert report["eval/loss"] < 0.97 * before  # an adapter that does nothing would give the first loss


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_command_gives_the_runs_own_figure(trained, world_size):
    command = ["-m", "loop.evaluate", "--config", str(trained / "config.yaml"), "--split", "valid", "--notes", "2", "micro_batch_size=2"]
    out = run_ok(world_size, *command)
    report = json.loads((trained / "report.json").read_text())
    assert report["evaluate/valid"]["eval/loss"] == pytest.approx(report["eval/loss"], rel=2e-3)
    assert report["evaluate/valid"]["notes"] == 2 and 0 <= report["evaluate/valid"]["notes with S, O, A, P"] <= 1
    assert "eval/perplexity" in out and "adapter" in out


@pytest.mark.parametrize(("args", "words"), [
    (["--split", "dev"], "--split dev"), (["--notes", "x"], "--notes x"), (["--split"], "--split: its value is missing"),
    (["--adapter", "nowhere"], "--adapter nowhere"),
])  # fmt: skip
def test_wrong_arguments_end_with_2(trained, args, words):
    (done,) = run_ranks(1, "-m", "loop.evaluate", "--config", str(trained / "config.yaml"), *args)
    assert done.returncode == 2 and words in done.stderr and done.stderr.startswith("error: ")


def test_no_tensor_of_the_adapter_is_missing_or_empty(trained):
    from safetensors.torch import load_file

    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3 and all(t.numel() > 0 and np.isfinite(t.float().numpy()).all() for t in tensors.values())
    assert all(t.abs().max() > 0 for t in tensors.values())  # B starts at zero: each was trained
    assert json.loads((trained / "adapter" / "trained.json").read_text())["method"] == "qlora" and ROOT.is_dir()
