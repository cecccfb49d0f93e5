"""The figures of a split, and that the saved adapter is the model that was trained."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_ok
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loop import evaluate
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


def test_any_number_of_ranks_and_any_batch_gives_the_same_figures(trained):
    """1, 2 and 4 ranks, micro-batches of one row and of two: three batches of notes, their scores and intervals are equal to the bit, the
    loss to rounding."""
    command = ["-m", "loop.evaluate", "--config", str(trained / "config.yaml"), "--split", "train", "monitor.sample_max_new_tokens=6"]
    seen = []
    for world_size, rows in ((1, "2"), (2, "1"), (4, "auto")):
        out = run_ok(world_size, *command, "--html", str(trained.parent / f"{world_size}.html"), f"micro_batch_size={rows}")
        seen.append(json.loads((trained / "report.json").read_text())["evaluate/train"])
        assert "ROUGE-Lsum" in out and "adapter" in out and "pain" not in out
    losses = [report["figures"].pop("loss") for report in seen]
    assert seen[0] == seen[1] == seen[2] and 32 < seen[0]["notes"] == seen[0]["examples"] == 40 - seen[0]["left out"]
    assert [loss["value"] for loss in losses] == pytest.approx([losses[0]["value"]] * 3, rel=2e-3)
    assert losses[0]["low"] < losses[0]["value"] < losses[0]["high"]
    pages = [(trained.parent / f"{world_size}.html").read_text().split("<section>")[1:] for world_size in (1, 2, 4)]
    assert pages[0] == pages[1] == pages[2] and len(pages[0]) == seen[0]["notes"]
    board = EventAccumulator(str(trained / "tensorboard" / "evaluate"))
    board.Reload()
    assert {"train/rouge1", "train/facts/supported", "train/loss"} <= set(board.Tags()["scalars"])


def test_the_command_gives_the_runs_own_loss(trained):
    run_ok(2, "-m", "loop.evaluate", "--config", str(trained / "config.yaml"), "--split", "valid", "--notes", "0", "micro_batch_size=2")
    report = json.loads((trained / "report.json").read_text())
    assert report["evaluate/valid"]["figures"]["loss"]["value"] == pytest.approx(report["eval/loss"], rel=2e-3)


def test_notes_of_a_file_are_scored_against_any_column(trained, tmp_path, capsys):
    """Without a model; and what is missing in the file is named."""
    rows = [json.loads(line) for line in open(load_config(["--config", str(trained / "config.yaml")]).data.valid)]
    notes = tmp_path / "theirs.jsonl"
    notes.write_text("".join(json.dumps({"id": row["id"], "note": row["dialogue"]}) + "\n" for row in rows))
    command = ["-m", "loop.evaluate", "--config", str(trained / "config.yaml"), "--split", "valid", "--predictions", str(notes)]
    run_ok(1, *command, "--reference", "dialogue", "base=nowhere/there")
    report = json.loads((trained / "report.json").read_text())["evaluate/valid/theirs"]
    assert report["figures"]["rouge2"]["value"] == report["figures"]["facts/supported"]["value"] == 1 and "loss" not in report["figures"]
    notes.write_text("".join(notes.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit) as end:
        evaluate.main(command[2:])
    assert end.value.code == 2 and f"1 of 6 examples have no note, first id {rows[-1]['id']}" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "words"), [
    (["--split", "dev"], "--split dev"), (["--notes", "x"], "--notes x"), (["--split"], "--split: its value is missing"),
    (["--adapter", "nowhere"], "--adapter nowhere"), (["--predictions", "nowhere"], "--predictions nowhere: No such file"),
    (["--html", "nowhere/x.html"], "--html nowhere/x.html"), (["--reference", "gold"], "no column 'gold'"),
])  # fmt: skip
def test_wrong_arguments_end_with_2(trained, capsys, args, words):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--config", str(trained / "config.yaml"), *(args if "--split" in args else ["--split", "valid", *args])])
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and said.startswith("error: ") and said.count("\n") == 1


def test_no_tensor_of_the_adapter_is_missing_or_empty(trained):
    from safetensors.torch import load_file

    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3 and all(t.numel() > 0 and np.isfinite(t.float().numpy()).all() for t in tensors.values())
    assert all(t.abs().max() > 0 for t in tensors.values())  # B starts at zero: each was trained
    assert json.loads((trained / "adapter" / "trained.json").read_text())["method"] == "qlora" and ROOT.is_dir()
