"""The run before its first step."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loop.plan import main, plot


def test_the_command(config_file, capsys, tmp_path):
    main(["--config", str(config_file), "--tokens-per-second", "50", "--tensorboard", str(tmp_path / "tb"), "max_seq_len=512"])
    out = capsys.readouterr().out
    for words in ("4 rows x 512 = 2,048 tokens", "learning rate over", "35 of 40 to train on", "min at 50 tokens/s (as given)", "frozen base",
                  "gradient checkpointing", "lack S:, O:, A:, P:"):  # fmt: skip
        assert words in out, words
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert "plan/lr" in board.Tags()["scalars"] and "plan/tokens_of_an_example" in board.Tags()["histograms"]
    assert any("plan" in tag for tag in board.Tags()["tensors"])


def test_the_time_is_the_last_runs_where_there_is_one(config_file, capsys, tmp_path):
    (tmp_path / "runs" / "t").mkdir(parents=True)
    (tmp_path / "runs" / "t" / "report.json").write_text(json.dumps({"train/tokens_per_second": 100.0}))
    main(["--config", str(config_file)])
    assert "at 100 tokens/s (as measured in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--config", str(config_file), "--tokens-per-second", "fast"])
    assert "--tokens-per-second fast" in capsys.readouterr().err


def test_the_plotted_curve_falls():
    rows = plot([1.0, 0.75, 0.5, 0.25, 0.01], height=4).splitlines()
    assert [row.split("|")[1].count("█") for row in rows] == [1, 2, 3, 4]
