"""The run before its first step."""

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loop.commands.plan import describe_parts, describe_time, main, plot
from loop.config.cli import load_config


def test_the_command(config_file, capsys, tmp_path):
    args = ["--config", str(config_file), "--tokens-per-second", "50"]
    main([*args, "--tensorboard", str(tmp_path / "tb"), "max_seq_len=512"])
    out = capsys.readouterr().out
    for words in (
        "4 rows x 512 = 2,048 tokens",
        "learning rate over",
        "35 of 40 to train on",
        "min at 50 tokens/s (as given)",
        "NF4 codes",
        "gradient checkpointing",
        "lack S:, O:, A:, P:",
    ):
        assert words in out, words
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert "plan/lr" in board.Tags()["scalars"]
    assert "plan/tokens_of_an_example" in board.Tags()["histograms"]
    assert any("plan" in tag for tag in board.Tags()["tensors"])


def test_a_wrong_schedule_or_optimizer_is_one_line(config_file, capsys):
    for setting in ("lr_schedule=liner", "optimizer=adam"):
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(config_file), setting])
        assert ended.value.code == 2
        assert f"{setting}: must be one of" in capsys.readouterr().err


def test_the_time_is_the_last_runs_where_there_is_one(config_file, capsys, tmp_path):
    (tmp_path / "runs" / "t").mkdir(parents=True)
    (tmp_path / "runs" / "t" / "report.json").write_text(
        json.dumps(
            {
                "train/tokens_per_second": 100.0,
                "time": {"imports": 5.25, "steps": 30.0},
                "time_to_first_step": {"imports": 5.25},
            }
        )
    )
    main(["--config", str(config_file), "--timing"])
    out = capsys.readouterr().out
    assert "at 100 tokens/s (as measured in" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["imports"] == ["5.2", "5.2"] and rows["sum"] == ["5.2", "35.2"]
    for rate in ("fast", "\u00b2", "0"):
        with pytest.raises(SystemExit):
            main(["--config", str(config_file), "--tokens-per-second", rate])
        assert f"--tokens-per-second {rate}" in capsys.readouterr().err


@pytest.mark.parametrize("time", ["5", '{"a": "x"}', "{}", '{"a": 1}, "time_to_first_step": 5'])
def test_a_damaged_report_is_no_report(config_file, time):
    config = load_config(["--config", str(config_file)])
    config.folder.mkdir(parents=True)
    for rate in ('"x"', "NaN", "[1]", "-1"):
        text = f'{{"train/tokens_per_second": {rate}, "time": {time}}}'
        (config.folder / "report.json").write_text(text)
        assert "not known before a first run" in describe_time(100, None, config)
        assert "not known before a first run" in describe_parts(config)


def test_a_folder_that_tensorboard_can_not_have_is_named(config_file, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config_file), "--tensorboard", "/dev/null/x"])
    assert ended.value.code == 2 and "--tensorboard /dev/null/x: " in capsys.readouterr().err


def test_whether_it_fits_is_answered_from_the_shape_alone(tiny_base, config_file, capsys, tmp_path):
    """The base's folder holds no weights; GPUs and their memory are those that were asked about."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (Path(tiny_base) / name).is_file():
            shutil.copy(Path(tiny_base) / name, tmp_path)
    args = ["--config", str(config_file), f"base={tmp_path}"]
    main([*args, "--gpus", "2", "--gpu-memory=2"])
    out = capsys.readouterr().out
    assert "of each of 2 GPU(s)" in out and "of 2 GiB: fits" in out and "on 2 rank(s)" in out
    large = ["gradient_checkpointing=false", "fused_layers=false"]
    main([*args, "--gpu-memory", "1.5", *large, "batch_size=64", "micro_batch_size=64"])
    out = capsys.readouterr().out
    assert "of each of 1 GPU(s)" in out and "of 1.5 GiB: does not fit" in out
    assert "would fit: micro_batch_size=" in out


@pytest.mark.parametrize(
    "option",
    [
        ["--gpus", "0"],
        ["--gpus", "many"],
        ["--gpu-memory", "-40"],
        ["--gpu-memory", "40GB"],
        ["--gpu-memory"],
    ],
)
def test_wrong_gpus_are_named(config_file, capsys, option):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config_file), *option])
    assert ended.value.code == 2 and " ".join(option) in capsys.readouterr().err


def test_the_plotted_curve_falls():
    rows = plot([1.0, 0.75, 0.5, 0.25, 0.01], height=4).splitlines()
    assert [row.split("|")[1].count("█") for row in rows] == [1, 2, 3, 4]
