"""The figures of a split."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, run_ok
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loop.commands import evaluate
from loop.config.cli import load_config
from loop.data.conversations import Conversation
from loop.generation.decode import Note


def test_any_number_of_ranks_and_any_batch_gives_the_same_figures(trained):
    """1 and 4 ranks, micro-batches of two rows and of one: three batches of notes, their scores and intervals are equal to the bit, the
    loss to rounding."""
    command = [
        "-m",
        "loop.commands.evaluate",
        "--config",
        str(trained / "config.yaml"),
        "--split",
        "train",
        "monitor.sample_max_new_tokens=6",
    ]
    seen = []
    for world_size, rows in ((1, "2"), (4, "1")):
        out = run_ok(
            world_size,
            *command,
            "--html",
            str(trained.parent / f"{world_size}.html"),
            f"micro_batch_size={rows}",
        )
        seen.append(json.loads((trained / "report.json").read_text())["evaluate/train"])
        assert "ROUGE-Lsum" in out and "adapter" in out and "pain" not in out
    losses = [report["figures"].pop("loss") for report in seen]
    assert (
        seen[0] == seen[1]
        and 32 < seen[0]["notes"] == seen[0]["examples"] == 40 - seen[0]["left out"]
    )
    assert [loss["value"] for loss in losses] == pytest.approx([losses[0]["value"]] * 2, rel=2e-3)
    assert losses[0]["low"] < losses[0]["value"] < losses[0]["high"]
    pages = [
        (trained.parent / f"{world_size}.html").read_text().split("<section>")[1:]
        for world_size in (1, 4)
    ]
    assert pages[0] == pages[1] and len(pages[0]) == seen[0]["notes"]
    board = EventAccumulator(str(trained / "tensorboard" / "evaluate"))
    board.Reload()
    assert {"train/rouge1", "train/facts/supported", "train/loss"} <= set(board.Tags()["scalars"])


def test_the_command_gives_the_runs_own_loss(trained):
    run_ok(
        2,
        "-m",
        "loop.commands.evaluate",
        "--config",
        str(trained / "config.yaml"),
        "--split",
        "valid",
        "--notes",
        "0",
        "micro_batch_size=2",
    )
    report = json.loads((trained / "report.json").read_text())
    assert report["evaluate/valid"]["figures"]["loss"]["value"] == pytest.approx(
        report["eval/loss"], rel=2e-3
    )


def test_notes_of_a_file_are_scored_against_any_column(trained, tmp_path, capsys):
    """Without a model; and what is missing in the file is named."""
    rows = [
        json.loads(line)
        for line in open(load_config(["--config", str(trained / "config.yaml")]).data.valid)
    ]
    notes = tmp_path / "theirs.jsonl"
    notes.write_text(
        "".join(json.dumps({"id": row["id"], "note": row["dialogue"]}) + "\n" for row in rows)
    )
    command = [
        "-m",
        "loop.commands.evaluate",
        "--config",
        str(trained / "config.yaml"),
        "--split",
        "valid",
        "--predictions",
        str(notes),
    ]
    run_ok(1, *command, "--reference", "dialogue", "base=nowhere/there")
    report = json.loads((trained / "report.json").read_text())["evaluate/valid/theirs"]
    assert (
        report["figures"]["rouge2"]["value"] == report["figures"]["facts/supported"]["value"] == 1
        and "loss" not in report["figures"]
    )
    notes.write_text("".join(notes.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit) as end:
        evaluate.main(command[2:])
    assert (
        end.value.code == 2
        and f"1 of 6 examples have no note, first id {rows[-1]['id']}" in capsys.readouterr().err
    )


def test_without_a_training_note_there_is_no_floor_of_the_nearest():
    """As where --reference names a column that the test data alone have."""
    alone = SimpleNamespace(rank=0, world_size=1, all_gather_json=lambda value: [value])
    rows = [
        Conversation("1", [], "Doctor: take 5 mg", "P: 5 mg"),
        Conversation("2", [], "Doctor: rest", "P: rest"),
    ]
    scored, figures = evaluate.score_all(
        rows, {"1": Note("P: 5 mg", True), "2": Note("P: 6 mg", True)}, [], alone
    )
    assert (
        len(scored) == 2
        and figures["rouge1"]["value"] > 0
        and not any("nearest" in key for key in figures)
    )


def test_an_adapter_of_another_base_is_refused(trained, tmp_path, capsys):
    """Its shapes fit, and the figures would be of nothing."""
    config = load_config(["--config", str(trained / "config.yaml")])
    other = shutil.copytree(config.base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(SystemExit) as end:
        evaluate.main(
            ["--config", str(trained / "config.yaml"), "--split", "valid", f"base={other}"]
        )
    assert end.value.code == 1 and "has another content now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--split", "dev"], "--split dev"),
        (["--notes", "x"], "--notes x"),
        (["--split"], "--split: its value is missing"),
        (["--adapter", "nowhere"], "--adapter nowhere"),
        (["--predictions", "nowhere"], "--predictions nowhere: No such file"),
        (["--html", "nowhere/x.html"], "--html nowhere/x.html"),
        (["--reference", "gold"], "no column 'gold'"),
    ],
)
def test_wrong_arguments_end_with_2(trained, capsys, args, words):
    with pytest.raises(SystemExit) as end:
        evaluate.main(
            [
                "--config",
                str(trained / "config.yaml"),
                *(args if "--split" in args else ["--split", "valid", *args]),
            ]
        )
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and words in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )


def test_no_tensor_of_the_adapter_is_missing_or_empty(trained):
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3 and all(
        t.numel() > 0 and np.isfinite(t.float().numpy()).all() for t in tensors.values()
    )
    assert all(t.abs().max() > 0 for t in tensors.values())  # B starts at zero: each was trained
    assert (
        json.loads((trained / "adapter" / "trained.json").read_text())["method"] == "qlora"
        and ROOT.is_dir()
    )
