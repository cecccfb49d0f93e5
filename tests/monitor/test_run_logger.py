"""What a run leaves for people to look at."""

import json
import re
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from loop.config.cli import load_config
from loop.data.conversations import read_split
from loop.monitor.run_logger import RunLogger
from loop.monitor.step_timer import PHASES

TRAIN = {
    f"train/{name}"
    for name in ("loss", "grad_norm", "lr", "tokens_per_second", "clipped_steps", "save_seconds")
}
MEMORY = {
    f"memory/{name}_gib"
    for name in ("frozen_weights", "scales", "trained_weights", "masters", "moments", "gradients")
}
SCALARS = TRAIN | {"eval/loss", "eval/perplexity"} | {f"time/{part}" for part in PHASES} | MEMORY


@pytest.fixture(scope="module")
def board(trained):
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    return board


def test_tensorboard_has_the_curves_and_metrics_the_same_numbers(trained, board):
    assert set(board.Tags()["scalars"]) == SCALARS | {
        "plan/lr",
        "plan/max_grad_norm",
    }  # and train/gpu_memory_gib on a GPU
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for name in SCALARS:
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert [e.step for e in board.Scalars(name)] == [step for step, _ in logged]
        assert [e.value for e in board.Scalars(name)] == pytest.approx(
            [value for _, value in logged], rel=1e-6
        )
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 7))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, 6]


def test_the_plan_is_on_the_board_and_the_account_in_the_folder(trained, board):
    """The planned learning rates are those that were run; every row is accounted for."""
    assert [e.value for e in board.Scalars("plan/lr")] == pytest.approx(
        [e.value for e in board.Scalars("train/lr")]
    )
    assert "plan/tokens_of_an_example" in board.Tags()["histograms"]
    accounts = json.loads((trained / "data.json").read_text())
    assert (
        accounts["train"]["rows"]
        == 40
        == accounts["train"]["kept"] + len(accounts["train"]["dropped"])
        and accounts["valid"]["rows"] == 6
    )


def test_sample_notes_are_shown_for_the_named_examples_alone(trained, board):
    assert {tag for tag in board.Tags()["tensors"] if tag.endswith("text_summary")} == {
        "notes/valid-1/text_summary",
        "plan/text_summary",
    }
    assert sorted(p.name for p in (trained / "samples").iterdir()) == [
        "prompts.md",
        "step-000000.md",
        "step-000003.md",
        "step-000006.md",
    ]
    assert "Doctor: " in (trained / "samples" / "prompts.md").read_text()


def test_the_folder_tells_what_was_run(trained):
    assert yaml.safe_load((trained / "config.yaml").read_text())["lr"] == 1e-2
    assert json.loads((trained / "ds_config.json").read_text())["gradient_clipping"] == 0.0
    versions = json.loads((trained / "versions.json").read_text())
    assert {"torch", "deepspeed", "peft", "commit", "device"} <= set(versions)
    report = json.loads((trained / "report.json").read_text())
    assert (
        report["steps"] == report["planned_steps"] == 6
        and report["train/loss_last"] < report["train/loss_first"]
    )


def test_no_patients_word_leaves_the_files_it_came_in(trained):
    """The run's folder is its owner's, and outside the named samples no line of a dialogue or note
    is in it or on the terminal.
    """
    assert stat.S_IMODE(trained.stat().st_mode) == 0o700
    config = load_config(["--config", str(trained / "config.yaml")])
    lines = [
        line
        for c in read_split(config, "train")[0]
        for line in c.dialogue.splitlines() + c.note.splitlines()
    ]
    shown = (
        trained / "samples" / "prompts.md"
    ).read_text()  # the named example's; made-up lines may be the same by chance
    secrets = [line for line in lines if len(line) > 12 and line not in shown]
    texts = [
        p.read_bytes().decode("utf-8", "replace")
        for p in trained.rglob("*")
        if p.is_file() and p.parent.name != "samples"
    ]
    texts.append((trained.parent / "stdout").read_text())
    assert len(secrets) > 20 and not any(s in t for s in secrets for t in texts)


def test_where_no_terminal_shows_a_bar_there_is_a_line_a_minute(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("loop.monitor.run_logger.time.perf_counter", lambda: now[0])
    config = SimpleNamespace(
        folder=tmp_path, max_grad_norm=1.0, monitor=SimpleNamespace(eval_steps=100)
    )
    logger = RunLogger.__new__(RunLogger)
    vars(logger).update(
        on=True,
        config=config,
        ranks=SimpleNamespace(device=torch.device("cpu")),
        first_step=0,
        num_steps=900,
        tokens=0,
        seconds=0.0,
        step_started=0.0,
        last_line=0.0,
        clipped=0,
        largest_micro_batch=0,
        mfu=lambda *_: {},
        timer=SimpleNamespace(stop=dict),
        scalars=lambda *_: None,
        bar=tqdm(total=900, disable=True),
    )
    row = SimpleNamespace(input_ids=torch.zeros(1, 12))
    result = SimpleNamespace(loss=1.5, grad_norm=0.5)
    for step in range(11, 100):  # of 31 seconds each: the second is the first after a minute
        now[0] += 31
        state = SimpleNamespace(step=step)
        logger.log_step(state, result, 1e-4, np.array([5, 7]), 3, [row])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 44
    assert lines[0] == "step 12 of 900: loss 1.5000, norm 0.50, lr 1.00e-04, 0 tokens/s"


def test_the_terminal_shows_the_arithmetic_and_where_to_look(trained):
    out = (trained.parent / "stdout").read_text()
    arithmetic = ("4 rows x 512 = 2,048 tokens", "the run     6 steps", "trainable parameters")
    for words in (
        *arithmetic,
        "a held-out conversation",
        "before training",
        "launch.sh board",
        "launch.sh generate",
    ):
        assert words in out, words
    assert re.search(r"step 3: .* tokens/s; 3 steps to go, about ", out)
    assert "GiB at the peak; measured" in out and "RSS rose" in out
    assert "warn" not in out.lower()
