"""A run's folder: one run at a time, and files that survive a kill."""

import json
from types import SimpleNamespace

import pytest

from loop.checkpoint.run_dir import LOCK, lines_to_keep, lock_folder, open_run_dir, write_report
from loop.config.cli import load_config
from loop.config.schema import ConfigError

ALONE = SimpleNamespace(is_main=True, all_gather_json=lambda value: [value])


def test_a_folder_has_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOP_GRACE_SECONDS", "0.3")
    with lock_folder(tmp_path):
        with pytest.raises(TimeoutError):
            lock_folder(tmp_path)
    lock_folder(tmp_path).close()
    assert (tmp_path / LOCK).exists()


def test_an_earlier_run_is_moved_aside_not_overwritten_and_a_running_one_is_left_alone(
    config_file, monkeypatch, capsys
):
    monkeypatch.setenv("LOOP_GRACE_SECONDS", "0.3")

    def load(option: str):
        return load_config(["--config", str(config_file), option])

    resumed, anew = load("run.resume=true"), load("run.resume=false")
    metrics = resumed.folder / "metrics.jsonl"
    with open_run_dir(resumed, ALONE) as run_dir:
        assert run_dir == resumed.folder
        metrics.write_text("{}")
        for config in (resumed, anew):
            with pytest.raises(ConfigError, match="run.name=t: another run writes"):
                with open_run_dir(config, ALONE):
                    pass
    with open_run_dir(anew, ALONE) as run_dir:
        assert run_dir == anew.folder
        assert (run_dir.with_name("t.1") / "metrics.jsonl").exists() and not metrics.exists()
        assert "t.1 now" in capsys.readouterr().out
        with pytest.raises(TimeoutError):
            lock_folder(run_dir)
    blocked = load(f"run.dir={config_file}")
    with pytest.raises(ConfigError, match="cannot be made"):
        with open_run_dir(blocked, ALONE):
            pass


def test_what_is_kept_of_a_log_makes_one_curve():
    lines = [
        {"step": 0, "eval/loss": 3.0},
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": float("nan")},
        {"step": 2, "eval/loss": 1.0},
        {"step": 3, "train/loss": 1.0},
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    log += '{"step": 4, "train/lo'  # killed in the middle of a line
    assert lines_to_keep(log, 0, True) == []  # there was no checkpoint: from the start again
    assert [str(line) for line in lines_to_keep(log, 2, True)] == [str(line) for line in lines[:4]]
    assert len(lines_to_keep(log, 2, False)) == 3  # its evaluation will be made again
    assert len(lines_to_keep(log, 9, True)) == 5


def test_a_report_is_whole_or_the_old_one(tmp_path, monkeypatch):
    write_report(tmp_path, {"steps": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, {"steps": 2})
    assert json.loads((tmp_path / "report.json").read_text()) == {"steps": 1}
