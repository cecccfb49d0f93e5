"""A sweep: which runs it plans, how it goes on after a stop, and which run it calls the best."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import helpers
import pytest
import yaml
from helpers import ROOT, communicate, wait_until

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.sweep import __main__ as command
from loop.sweep import inputs
from loop.sweep.grid import plan_sweep, split_values
from loop.sweep.results import as_table, read_result, winner

# In the place of Python with the ranks: a run whose lr is in the file `fails` fails, any other one
# ends as runs do.
STAND_IN = """#!/bin/sh
case "$*" in *loop.commands.plan*) exit 0;; esac
for word; do case $word in run.dir=*) dir=${word#*=};; run.name=*) name=${word#*=};; esac; done
echo "$name" >> "$dir/started"
grep -qx "$name" "$dir/fails" 2>/dev/null && exit 7
cd "$dir/$name" && echo '{"steps": 6, "planned_steps": 6}' > report.json
"""


DAMAGED = '{"step": 1, "eval/loss": 0.1\n{"step": "x"}\n{"step": 2, "eval/loss": "x"}\n\0}\n'


@pytest.fixture
def sweep_of(config_file):
    """The sweep of some words, each run's folder as a run leaves it before its first step."""

    def plan(*words: str):
        sweep = plan_sweep(["--config", str(config_file), *words])
        for run in sweep.runs:
            run.config.folder.mkdir(parents=True, exist_ok=True)
            content = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
            (run.config.folder / "config.yaml").write_text(content)
        return sweep

    return plan


def finish(run, *losses: float, **report) -> None:
    lines = [{"step": step, "eval/loss": loss} for step, loss in enumerate(losses)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + DAMAGED
    (run.config.folder / "metrics.jsonl").write_text(text + '{"step": 9, "eval/lo')  # torn
    done = {"steps": 6, "planned_steps": 6} | report
    (run.config.folder / "report.json").write_text(json.dumps(done))


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("true, null", ["true", "null"]),
        ("[0.9, 0.95],[0.8, 0.99]", ["[0.9, 0.95]", "[0.8, 0.99]"]),
        ("{r: 8, lora_alpha: 16}", ["{r: 8, lora_alpha: 16}"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("[1, 2", ["[1, 2"]),
        ("3", ["3"]),
    ],
)
def test_a_value_is_split_as_a_yaml_list_is(value, values):
    assert split_values(value) == values


def test_every_combination_is_a_run_of_its_own(sweep_of, config_file):
    sweep = sweep_of("lr=1e-4,3e-4", "lora.r=16,64", "seed=7", "betas=[0.9, 0.95]")
    found = [(run.config.lr, run.config.lora["r"]) for run in sweep.runs]
    assert found == [(1e-4, 16), (1e-4, 64), (3e-4, 16), (3e-4, 64)]
    assert {run.config.seed for run in sweep.runs} == {7}
    assert sweep.folder == config_file.parent / "runs" / "t-sweep"
    assert sweep.runs[0].config.folder == sweep.folder / "lr=1e-4,lora.r=16"
    assert len({run.config.folder for run in sweep.runs}) == 4
    named = sweep_of("lr=1e-4,3e-4", "run.name=mine", "--gpus", "2")
    assert named.folder.name == "mine" and named.takes_gpus
    assert named.runs[0].args[0] == "--gpus=2"
    paths = sweep_of("data.train=a/b.jsonl,../c.jsonl")
    assert paths.runs[0].config.folder.parent == paths.folder  # no path within a name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr=1e-4"], "nothing to sweep"),
        (["lr=1e-4;3e-4"], r"nothing to sweep \(lr=1e-4;3e-4: one value each\): give a key"),
        (["lr=[1e-4,3e-4]"], r"\(lr=\[1e-4,3e-4\]: one value each\)"),
        (["lr=1e-4,"], r"\(lr=1e-4,: one value each\)"),
        (["lr=1e-4,1e-4"], "twice"),
        (["lr=1e-4,3e-4", "lr=1e-3,2e-3"], "twice"),
        (["lr=1e-4,3e-4", "lr=1e-3"], "lr=1e-3: lr is swept already"),
        (["lr=1e-4,0.0001"], "lr=0.0001: is the same run as lr=1e-4; leave one out"),
        (["run.seed=1,2"], "can't be compared"),
        (["monitor.best=loss,rouge1"], "can't be compared"),
        (["lr=1e-4,fast"], "lr='fast'"),
        (["learning_rate=1,2"], "learning_rate"),
        (["lr=1e-4,3e-4", "run.dir=/dev/null"], "cannot be made"),
        (["lr=1e-4,3e-4", "--gpus", "many"], "--gpus takes a number"),
        ([f"{key}={','.join(map(str, range(1, 40)))}" for key in ("seed", "epochs")], "combin"),
        (["lr=1e-4,3e-4", "seed=" + "[" * 5000], "seed"),
        (["lr=1e-4,3e-4", "data.valid=null", "data.valid_fraction=0"], "needs validation"),
    ],
)
def test_what_can_not_be_swept_is_one_line(config_file, words, said):
    with pytest.raises(ConfigError, match=said) as error:
        command.make_folder(plan_sweep(["--config", str(config_file), *words]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ("a b.json,a-b.json", ["deepspeed=a-b.json", "run-2"]),
        (f"{'x' * 150}.json,b.json", ["run-1", "deepspeed=b.json"]),
    ],
)
def test_every_run_has_a_folder_of_its_own(config_file, values, names):
    sweep = plan_sweep(["--config", str(config_file), f"deepspeed={values}"])
    assert [run.config.run.name for run in sweep.runs] == names
    assert [f"run.name={name}" in run.args for name, run in zip(names, sweep.runs)] == [True] * 2


def test_the_winner_is_the_finished_run_with_the_best_validation(sweep_of):
    sweep = sweep_of("lr=1e-4,2e-4,3e-4,4e-4")
    finish(sweep.runs[0], 3.0, 1.5, 2.0)
    finish(sweep.runs[1], 3.0, 1.0, planned_steps=9)  # better, and not at its end
    finish(sweep.runs[2], 3.0, float("nan"), 1.25)
    results = [read_result(run) for run in sweep.runs]
    assert [result.finished for result in results] == [True, False, True, False]
    assert [result[:2] for result in results[:3]] == [(1.5, 1), (1.0, 1), (1.25, 2)]
    assert winner(sweep, results) == 2
    lines = as_table(sweep, results, {3: 7}).splitlines()
    assert lines[0].split("  ")[0] == "lr" and lines[3].endswith("best")
    assert "failed, exit code 7" in lines[4] and lines[5].endswith("lr=3e-4")
    finish(sweep.runs[1], 3.0, 1.0, planned_steps=9, ended_early="patience")
    assert winner(sweep, [read_result(run) for run in sweep.runs]) == 1
    other = sweep_of("lr=1e-4,2e-4", "seed=1")
    assert read_result(other.runs[0]).finished  # its folder says seed=1 as well by now
    assert not read_result(sweep.runs[0]).finished  # and no longer what this sweep would run


def test_by_a_metric_of_notes_the_highest_wins(sweep_of):
    sweep = sweep_of("lr=1e-4,2e-4", "monitor.best=rouge1", "monitor.best_notes=2")
    for run, value in zip(sweep.runs, (0.5, 0.25)):
        finish(run)
        line = {"step": 3, "eval/loss": value, "eval/rouge1": value}
        (run.config.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert winner(sweep, [read_result(run) for run in sweep.runs]) == 0


def test_what_failed_does_not_stop_the_others_and_what_is_finished_is_not_repeated(
    sweep_of, config_file, monkeypatch, capsys
):
    words = ["lr=1e-4,2e-4,3e-4"]
    sweep = sweep_of(*words)
    stand_in = config_file.parent / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    (sweep.folder / "fails").write_text("lr=2e-4\n")

    def run(gpus: str) -> int:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        with pytest.raises(SystemExit) as end:
            command.main(["--config", str(config_file), *words])
        return end.value.code

    assert run("") == 1
    started = sweep.folder / "started"
    assert started.read_text().split() == ["lr=1e-4", "lr=2e-4", "lr=3e-4"]
    assert "lr=2e-4 failed with exit code 7; the others go on" in capsys.readouterr().out
    (sweep.folder / "fails").unlink()
    assert run("0,1") == 0  # the one that failed, on a GPU of its own
    assert started.read_text().split()[3:] == ["lr=2e-4"]
    assert "on GPU 0, into" in capsys.readouterr().out
    written = json.loads((sweep.folder / "sweep.json").read_text())
    assert written["best"] is None and [row["finished"] for row in written["runs"]] == [True] * 3
    assert sweep.folder.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_bases_and_data_are_checked_before_the_first_run(config_file, tmp_path, capsys):
    missing, good = tmp_path / "missing.jsonl", load_config(["--config", str(config_file)])
    sweeps = {
        "base=loop/embedded/base,nowhere/at/all": "run base=nowhere-at-all: base=nowhere/at/all",
        f"data.train={good.data.train},{missing}": "no such file or folder",
    }
    for words, said in sweeps.items():
        with pytest.raises(SystemExit) as end:
            command.main(["--config", str(config_file), words, "run.name=checked"])
        told = capsys.readouterr()
        assert end.value.code == 2 and said in told.err and told.err.count("\n") == 1
        assert "run 1 of" not in told.out
    assert not [*(tmp_path / "runs" / "checked").glob("*/checkpoints")]


def test_runs_that_share_base_and_data_are_checked_once(sweep_of, monkeypatch):
    asked = []

    def ask(arguments, **_):
        asked.append(arguments)
        return SimpleNamespace(returncode=1, stderr="error: no memory\n")  # the run will say it

    monkeypatch.setattr(subprocess, "run", ask)
    said: list[str] = []
    inputs.check_inputs(sweep_of("lr=1e-4,2e-4", "lora.r=4,8", "--gpus", "1").runs, said.append)
    assert len(asked) == 2 and not any("gpus" in word for words in asked for word in words)
    assert len(said) == 2 and said[0].startswith("checking the base and the data of run ")


def test_what_the_last_run_lacks_is_said_before_the_first(sweep_of, monkeypatch, capsys):
    def ask(arguments, **_):
        told = "a warning\nerror: base=x: no such folder\n" if "lora.r=8" in arguments else ""
        return SimpleNamespace(returncode=2 if told else 0, stderr=told)

    sweep = sweep_of("lora.r=4,8")
    monkeypatch.setattr(subprocess, "run", ask)
    monkeypatch.setattr(command, "plan_sweep", lambda argv: sweep)
    with pytest.raises(SystemExit) as end:
        command.main([])
    told = capsys.readouterr()
    assert end.value.code == 2 and told.out.count("sweep: checking the base") == 2
    assert told.err == "error: run lora.r=8: base=x: no such folder\n"


def test_a_stop_is_passed_on_to_the_runs_that_are_on(sweep_of, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    runner, asked = command.Runner(sweep_of("lr=1e-4,2e-4,3e-4"), ["0", "1"]), []
    monkeypatch.setattr(runner, "_start", lambda *args: asked.append("started"))
    for number, slot in enumerate(runner.slots):
        process = SimpleNamespace(
            pid=number,
            terminate=lambda slot=slot: asked.append(slot),
            poll=iter([None, 1]).__next__,
        )
        runner.running[slot] = (number, process)
    runner._count_request(signal.SIGINT, None)
    runner.run()
    assert asked == ["0", "1"] and not runner.running  # the third one does not start
    assert not runner.failed  # they were asked to end


def test_a_signal_that_is_ignored_stays_ignored(sweep_of, monkeypatch):
    """As under nohup, whose sweep goes on when the terminal is closed."""
    taken = []
    ignored = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", lambda number: ignored.get(number, signal.SIG_DFL))
    monkeypatch.setattr(signal, "signal", lambda number, handler: taken.append(number))
    command.Runner(sweep_of("lr=1e-4,2e-4"), [])
    assert taken == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.slow
def test_a_sweep_stops_and_goes_on(config_file, tmp_path):
    """Ctrl-C in its second run: that one saves and ends; the same command does what is missing.

    The steps are so many that the second run is not at its end when the signal arrives.
    """
    words = ["--config", str(config_file), "lr=1e-4,2e-3", "max_steps=30", "run.save_steps=1"]
    words += ["--gpus", "1", "monitor.eval_steps=15", "epochs=30"]
    folder = tmp_path / "runs" / "t-sweep"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    start = [helpers.PYTHON, "-m", "loop.sweep", *words]
    process = subprocess.Popen(
        start, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    second = folder / "lr=2e-3" / "checkpoints"
    wait_until(lambda: any(second.glob("step-*")), 240)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = communicate(process, 120)
    assert process.returncode == command.STOPPED, out
    assert "stopped; the same command goes on" in out
    first = (folder / "lr=1e-4" / "report.json").stat().st_mtime_ns
    assert json.loads((folder / "sweep.json").read_text())["best"] == "lr=1e-4"
    done = helpers.run(start, 300, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming" in done.stdout.lower() or "resumed" in done.stdout.lower()
    assert (folder / "lr=1e-4" / "report.json").stat().st_mtime_ns == first
    written = json.loads((folder / "sweep.json").read_text())
    assert written["best"] == "lr=2e-3" and all(row["finished"] for row in written["runs"])
