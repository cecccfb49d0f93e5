"""The figures of a split."""

import json

import numpy as np
import pytest
from conftest import ROOT, run_ok, run_ranks


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
