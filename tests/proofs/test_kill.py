"""A run that is killed at any instant goes on by itself from its last checkpoint and ends as if it
had never been broken off.
"""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import CPU, PYTHON, ROOT, ends_within, wait_until
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WHOM = ["everybody", "launch.sh", "the launcher", "rank 0", "rank 1"]


def launch(config_file: Path, name: str, *args: str) -> subprocess.Popen:
    env = os.environ | CPU | {"LOOP_PYTHON": PYTHON, "LOOP_GRACE_SECONDS": "60"}
    if (slow_disk := config_file.parent / "slow_disk").is_dir():
        env["PYTHONPATH"] = str(slow_disk)
    log = (config_file.parent / f"{name}.log").open("a")
    return subprocess.Popen(
        [str(ROOT / "launch.sh"), "--config", str(config_file), f"run.name={name}", *args],
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def finish(config_file: Path, name: str) -> None:
    assert ends_within(launch(config_file, name), 600) == 0, (
        config_file.parent / f"{name}.log"
    ).read_text()[-3000:]


def processes(config_file: Path, name: str) -> dict[str, psutil.Process]:
    """Those of the run, by what they are."""
    found = {}
    for p in psutil.process_iter():
        try:
            command = " ".join(p.cmdline())
            if (
                f"run.name={name} " not in f"{command} "
                or str(config_file) not in command
                or p.status() == psutil.STATUS_ZOMBIE
            ):
                continue
            if (
                "launch.sh" in command or "loop.distributed.launcher" in command
            ):  # the one becomes the other
                found["launch.sh"] = p
            elif "loop.distributed.start_ranks" in command:
                found["the launcher"] = p
            elif (rank := p.environ().get("RANK")) is not None:
                found[f"rank {rank}"] = p
        except psutil.Error:
            continue
    return found


def doing(folder: Path, since: float) -> tuple[int, str]:
    """The step rank 0 is in and what it wrote last that it is doing, (-1, "") if nothing yet."""
    try:
        beat = json.loads((folder / "heartbeat" / "rank-0.json").read_text())
        return (beat["step"], beat["doing"]) if beat["alive"] > since else (-1, "")
    except (OSError, ValueError):
        return -1, ""


def what_is_written(folder: Path) -> str:
    """ "save", "export", or "" where neither a checkpoint nor the adapter is being written."""
    if any((folder / "checkpoints").glob(".*-*")):
        return "save"
    return "export" if (folder / ".writing-adapter").exists() else ""


def kill(config_file: Path, name: str, whom: str, instant) -> str | None:
    """Starts or continues the run and sends SIGKILL when `instant` says so, given for how many
    seconds its ranks work, the step, and what is being written. Returns what rank 0
    was doing, None if the run had ended before. All of its processes must be gone within the grace
    time, whoever was killed.
    """
    folder, started, working = config_file.parent / "runs" / name, time.monotonic(), None
    process = launch(config_file, name)
    while process.poll() is None:
        step, what = doing(folder, started)
        working = working or (time.monotonic() if step >= 0 else None)
        writing = what_is_written(folder)
        if working and instant(time.monotonic() - working, step, writing):
            break
        time.sleep(0.005)
    running = processes(config_file, name)
    for who, p in running.items():
        if whom in (who, "everybody"):
            p.kill()
    ends_within(process, 90)
    wait_until(lambda: not processes(config_file, name), 90)
    if not running:
        return None
    inside = f", inside a {writing}" if writing else ""
    return f"in step {step} ({what}{inside})"


def curve(folder: Path, key: str) -> list[tuple[int, float]]:
    return [
        (line["step"], line[key])
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if key in line
    ]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Bitwise: every logged figure once, TensorBoard's points, the checkpoint's tensors and the
    adapter.
    """
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for key in ("train/loss", "train/grad_norm", "train/lr", "eval/loss"):
        assert curve(folder, key) == curve(whole, key), key
        assert [(e.step, e.value) for e in board.Scalars(key)] == [
            (s, pytest.approx(v, rel=1e-6)) for s, v in curve(whole, key)
        ], key
    manifests = [
        json.loads((f / "checkpoints" / "newest" / "manifest.json").read_text())
        for f in (folder, whole)
    ]
    for key in ("step", "optimizer_step", "files", "rng", "identity"):
        assert manifests[0][key] == manifests[1][key], key
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    notes = [sorted(f.glob("samples/step-*.md")) for f in (folder, whole)]
    assert [p.read_text() for p in notes[0]] == [p.read_text() for p in notes[1]] and len(
        notes[0]
    ) > 2
    assert not list(folder.glob("heartbeat/rank-*.json"))


def test_a_run_that_is_killed_ends_as_the_unbroken_one(trained, tmp_path):
    """First launch.sh alone, upon which the ranks save and end by themselves, then everybody at
    once in the middle of a save.
    """
    config = json.loads((trained.parent / "config.yaml").read_text())
    config["run"] |= {"dir": str(tmp_path / "runs"), "save_steps": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"max_steps": 6}))
    (
        tmp_path / "slow_disk"
    ).mkdir()  # on a fast one a save is over before a busy machine has looked
    (tmp_path / "slow_disk" / "sitecustomize.py").write_text(
        "import os, time\nfsync = os.fsync\n"
        "os.fsync = lambda file: (time.sleep(0.05), fsync(file))[1]\n"
    )
    assert kill(
        tmp_path / "config.yaml", "killed", "launch.sh", lambda seconds, step, writing: step >= 1
    )
    assert kill(
        tmp_path / "config.yaml",
        "killed",
        "everybody",
        lambda seconds, step, writing: writing == "save",
    )
    finish(tmp_path / "config.yaml", "killed")
    assert_same_run(tmp_path / "runs" / "killed", trained)
    assert "resumed from" in (tmp_path / "killed.log").read_text()


@pytest.mark.slow
def test_fifty_kills_change_nothing(config_file):
    """LOOP_KILLS and LOOP_SEED set how many, and which; after LOOP_KILL_SECONDS there are no more.
    A run that comes to its end between two kills is compared, and another begun.
    """
    end = time.monotonic() + float(os.environ.get("LOOP_KILL_SECONDS", "inf"))
    config = json.loads(config_file.read_text())
    config |= {
        "epochs": 3,
        "lora": {"lora_dropout": 0.2},
        "monitor": {"eval_steps": 3, "sample_notes": ["valid-1"]},
        "generation": {"max_new_tokens": 8},
    }
    config_file.write_text(json.dumps(config))
    rng, kills, done, number = (
        random.Random(int(os.environ.get("LOOP_SEED", 0))),
        int(os.environ.get("LOOP_KILLS", 50)),
        0,
        0,
    )
    finish(config_file, "whole")
    runs = config_file.parent / "runs"
    while done < kills or not (runs / f"killed{number}" / "adapter").is_dir():
        name = f"killed{number}"
        kills = kills if time.monotonic() < end else done
        if done < kills:
            whom = rng.choice(WHOM)
            # Every fourth falls inside a save, every tenth inside the export, the others anywhere.
            inside = "export" if done % 10 == 1 else ""
            inside = "save" if done % 4 == 0 else inside
            after = 0.0 if inside == "export" else rng.uniform(0.0, 6.0)
            if where := kill(
                config_file,
                name,
                whom,
                lambda seconds, step, writing: seconds > after and writing.startswith(inside),
            ):
                done += 1
                print(f"{done}: {whom} after {after:.1f} s {where}", flush=True)
        if done == kills or (runs / name / "adapter").is_dir():
            finish(config_file, name)
            assert_same_run(runs / name, runs / "whole")
            print(f"{name} equals the unbroken run", flush=True)
            number += done < kills
