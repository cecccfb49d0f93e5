"""The evaluation of a split by its command."""

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import CPU, PYTHON, ROOT, communicate, run_ok, wait_until, write_rows
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loop.commands import evaluate
from loop.config.cli import load_config
from loop.distributed.files import sha256


def command(trained, *args: str) -> list[str]:
    return ["-m", "loop.commands.evaluate", "--config", str(trained / "config.yaml"), *args]


def report_of(trained) -> dict:
    return json.loads((trained / "report.json").read_text())


def test_any_number_of_ranks_and_any_batch_gives_the_same_metrics(trained):
    """1 and 4 ranks, micro-batches of two rows and of one; three batches of notes.

    Their scores and intervals are equal to the bit, the loss to rounding.
    """
    reports = []
    for world_size, rows in ((1, "2"), (4, "1")):
        html = str(trained.parent / f"{world_size}.html")
        args = ["--html", html, "generation.max_new_tokens=6", f"micro_batch_size={rows}"]
        out = run_ok(world_size, *command(trained, "--split", "train", *args))
        reports.append(report_of(trained)["evaluate/train"])
        assert "ROUGE-Lsum" in out and "adapter" in out and "pain" not in out
        shutil.rmtree(trained / "evaluate")  # or the next one would find these notes
    assert all(sum(report.pop("time").values()) > 1 for report in reports)
    losses = [report["figures"].pop("loss") for report in reports]
    assert reports[0] == reports[1]
    assert 32 < reports[0]["notes"] == reports[0]["examples"] == 40 - reports[0]["left out"]
    assert [loss["value"] for loss in losses] == pytest.approx([losses[0]["value"]] * 2, rel=2e-3)
    assert losses[0]["low"] < losses[0]["value"] < losses[0]["high"]
    pages = [
        (trained.parent / f"{world_size}.html").read_text().split("<section ")[1:]
        for world_size in (1, 4)
    ]
    assert pages[0] == pages[1] and len(pages[0]) == reports[0]["notes"]
    board = EventAccumulator(str(trained / "tensorboard" / "evaluate"))
    board.Reload()
    assert {"train/rouge1", "train/facts/supported", "train/loss"} <= set(board.Tags()["scalars"])


def test_the_command_gives_the_runs_own_loss(trained):
    run_ok(2, *command(trained, "--split", "valid", "--notes", "0", "micro_batch_size=2"))
    report = report_of(trained)
    loss = report["evaluate/valid"]["figures"]["loss"]["value"]
    assert loss == pytest.approx(report["eval/loss"], rel=2e-3)


def launch(folder: Path, *args: str) -> subprocess.Popen:
    """The command on two ranks, for the run in `folder`."""
    return subprocess.Popen(
        [str(ROOT / "launch.sh"), "evaluate", "--config", str(folder / "config.yaml"), *args],
        env=os.environ | CPU | {"LOOP_PYTHON": PYTHON},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def count_lines(folder: Path) -> int:
    """Whole lines in the files of ranks."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.rank-*.jsonl"))


def await_notes(process: subprocess.Popen, folder: Path, more_than: int) -> None:
    """Waits until the files of ranks hold more whole lines."""
    wait_until(lambda: count_lines(folder) > more_than or process.poll() is not None, 120)
    assert process.poll() is None, f"it ended before: {process.communicate()[0][-2000:]}"


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the command and to what it started."""
    everybody = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everybody:
        one.kill()
    psutil.wait_procs(everybody, 30)
    process.communicate()


def test_a_stopped_evaluation_goes_on_with_the_notes_that_it_lacks(trained, tmp_path):
    """Killed, then ended by SIGTERM, then finished by one rank: as if it had never been stopped."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "evaluate", ignore_errors=True)
    rows = write_rows(tmp_path / "many.jsonl", "many", 120, 5)  # eight batches
    args = [f"run.dir={tmp_path}", f"data.test={rows}", "generation.max_new_tokens=60"]
    folder = run / "evaluate" / "test"
    first = launch(run, *args)
    await_notes(first, folder, 0)
    kill_all(first)
    kept = count_lines(folder)
    second = launch(run, *args)
    await_notes(second, folder, kept)
    second.send_signal(signal.SIGTERM)
    out = communicate(second, 100)[0]
    assert second.returncode == 130
    assert "stopped by SIGTERM; the " in out and "the same command goes on" in out
    assert "Traceback" not in out and "pain" not in out
    out = run_ok(1, *command(run, *args))
    resumed = report_of(run)["evaluate/test"]
    reused, written = resumed.pop("notes reused"), resumed.pop("notes written")
    assert reused > kept > 0 and written > 0 and reused + written == resumed["notes"]
    assert f"{reused:,} notes reused, {written:,} notes written" in out
    (whole,) = folder.iterdir()
    assert stat.S_IMODE(whole.stat().st_mode) == 0o600
    notes = [json.loads(line) for line in whole.read_text().splitlines()]
    shutil.rmtree(folder)
    run_ok(1, *command(run, *args))
    uninterrupted = report_of(run)["evaluate/test"]
    assert uninterrupted.pop("notes reused") == 0
    assert uninterrupted.pop("notes written") == uninterrupted["notes"]
    assert resumed | {"time": None} == uninterrupted | {"time": None}
    assert notes == [json.loads(line) for line in whole.read_text().splitlines()]


@pytest.mark.slow
def test_notes_of_other_weights_or_settings_are_not_reused(trained, tmp_path):
    """Each of them has a file of its own; the first one's is found again."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "evaluate", ignore_errors=True)
    args = command(run, f"run.dir={tmp_path}", "--split", "valid", "generation.max_new_tokens=4")

    def reused(*more: str) -> int:
        run_ok(1, *args, *more)
        report = report_of(run)["evaluate/valid"]
        assert report["notes reused"] + report["notes written"] == report["notes"] > 3
        return report["notes reused"]

    assert reused() == 0
    assert reused() == report_of(run)["evaluate/valid"]["notes"]
    assert reused("generation.no_repeat_ngram=2") == 0
    assert reused("--notes", "4") == 0  # another batch; a note may be rounded another way in it
    weights = run / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    trained_json = run / "adapter" / "trained.json"
    recorded = json.loads(trained_json.read_text()) | {"sha256": sha256(weights)}
    trained_json.write_text(json.dumps(recorded))
    assert reused() == 0
    names = {path.name for path in (run / "evaluate" / "valid").iterdir()}
    assert len(names) == 4 and not any("rank" in name for name in names)


def test_notes_of_a_file_are_scored_against_any_column(trained, tmp_path, capsys):
    """Without a model; and what is missing in the file is named."""
    config = load_config(["--config", str(trained / "config.yaml")])
    rows = [json.loads(line) for line in open(config.data.valid)]
    predictions = tmp_path / "theirs.jsonl"
    predictions.write_text(
        "".join(json.dumps({"id": row["id"], "note": row["dialogue"]}) + "\n" for row in rows)
    )
    args = command(trained, "--split", "valid", "--predictions", str(predictions))
    run_ok(1, *args, "--reference", "dialogue", "base=nowhere/there")
    metrics = report_of(trained)["evaluate/valid/theirs"]["figures"]
    assert metrics["rouge2"]["value"] == metrics["facts/supported"]["value"] == 1
    assert "loss" not in metrics
    challenged = report_of(trained)["evaluate/valid/theirs"]["challenge"]
    assert sum(tried for _, tried in challenged.values()) > 0
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit) as end:
        evaluate.main(args[2:])
    assert end.value.code == 2
    message = f"1 of 6 examples have no note, first id {rows[-1]['id']}"
    assert message in capsys.readouterr().err


def test_the_scorer_is_tried_on_reference_notes_alone(trained, capsys):
    """No model is loaded: the base is nowhere."""
    args = command(trained, "--challenge", "--split", "valid", "base=nowhere/there")[2:]
    evaluate.main(args)
    table = capsys.readouterr().out
    assert table.startswith("valid, its reference notes\n  made wrong in one place, and noticed:")
    assert len(table.splitlines()) > 2
    with pytest.raises(SystemExit) as end:
        evaluate.main([*args, "--html", "x.html"])
    assert end.value.code == 2 and "--html: --challenge tries" in capsys.readouterr().err


def test_notes_are_told_by_weights_scale_and_base_as_they_were_trained(trained, tmp_path):
    """Whatever the configuration says of the base's rounding."""
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    options = evaluate.take_evaluation_options(["--split", "valid", "--adapter", str(adapter)])
    other = ["--config", str(trained / "config.yaml"), "method=lora", "double_quant=false"]
    config, options = evaluate.choose_weights(load_config(other), options)
    assert (config.method, config.double_quant) == ("qlora", True)
    by = evaluate.written_by(config, options)
    assert by == evaluate.written_by(config, options) and by["storage"] == "nf4"
    plain = evaluate.written_by(config.model_copy(update={"method": "lora"}), options)
    assert by.items() - plain.items() == {("storage", "nf4")}
    scale = adapter / "adapter_config.json"
    scale.write_text(json.dumps(json.loads(scale.read_text()) | {"lora_alpha": 1}))
    rescaled = evaluate.written_by(config, options)
    assert by.items() - rescaled.items() == {("adapter", by["adapter"])}


def test_an_adapter_of_another_base_is_refused(trained, tmp_path, capsys):
    """Its shapes fit, and the metrics would mean nothing."""
    config = load_config(["--config", str(trained / "config.yaml")])
    other = shutil.copytree(config.base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as end:
        evaluate.main(command(trained, "--split", "valid", f"base={other}")[2:])
    assert end.value.code == 1 and "has another content now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--split", "dev"], "--split dev"),
        (["--notes", "x"], "--notes x"),
        (["--notes", "²"], "--notes ²"),
        (["--split"], "--split: its value is missing"),
        (["--adapter", "nowhere"], "--adapter nowhere"),
        (["--predictions", "nowhere"], "--predictions nowhere: No such file"),
        (["--html", "nowhere/x.html"], "--html nowhere/x.html"),
        (["--reference", "gold"], "no column 'gold'"),
    ],
)
def test_wrong_arguments_end_with_2(trained, capsys, args, words):
    args = args if "--split" in args else ["--split", "valid", *args]
    with pytest.raises(SystemExit) as end:
        evaluate.main(command(trained, *args)[2:])
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message
    assert message.startswith("error: ") and message.count("\n") == 1


def test_no_tensor_of_the_adapter_is_missing_or_empty(trained):
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3
    assert all(t.numel() > 0 and np.isfinite(t.float().numpy()).all() for t in tensors.values())
    assert all(t.abs().max() > 0 for t in tensors.values())  # B starts at zero: each was trained
    trained_json = json.loads((trained / "adapter" / "trained.json").read_text())
    assert trained_json["method"] == "qlora"
