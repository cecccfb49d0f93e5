"""A run that is killed at any instant goes on by itself from its last checkpoint and ends as if it had never been broken off."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ARGS = ["epochs=3", "lr=1e-3", "lora.lora_dropout=0.2", "run.save_steps=2", "monitor.eval_steps=3", "monitor.sample_notes=[valid-1]",
        "monitor.sample_max_new_tokens=8"]  # fmt: skip
WHOM = ["everybody", "launch.sh", "the runner", "the launcher", "rank 0", "rank 1"]


def launch(config_file: Path, name: str, *args: str) -> subprocess.Popen:
    env = os.environ | {"LOOP_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOOP_GRACE_SECONDS": "60"}
    log = (config_file.parent / f"{name}.log").open("a")
    return subprocess.Popen([str(ROOT / "launch.sh"), "--config", str(config_file), f"run.name={name}", *ARGS, *args],
                            env=env, stdout=log, stderr=log, start_new_session=True)  # fmt: skip


def processes(config_file: Path, name: str) -> dict[str, psutil.Process]:
    """Those of the run, by what they are."""
    found = {}
    for p in psutil.process_iter():
        try:
            command = " ".join(p.cmdline())
            if f"run.name={name} " not in f"{command} " or str(config_file) not in command or p.status() == psutil.STATUS_ZOMBIE:
                continue
            if "launch.sh" in command:
                found["launch.sh"] = p
            elif "deepspeed.launcher.runner" in command:
                found["the runner"] = p
            elif "deepspeed.launcher.launch" in command:
                found["the launcher"] = p
            elif (rank := p.environ().get("RANK")) is not None:
                found[f"rank {rank}"] = p
        except psutil.Error:
            continue
    return found


def doing(folder: Path, rank: int) -> str:
    """What a rank wrote last that it is doing."""
    try:
        return json.loads((folder / "heartbeat" / f"rank-{rank}.json").read_text())["doing"]
    except (OSError, ValueError, KeyError):
        return "starting"


def kill_at(config_file: Path, name: str, whom: str, seconds: float) -> str | None:
    """Starts or continues the run and sends SIGKILL `seconds` after its ranks have begun to work. Returns what rank 0 was doing, None if
    it had ended before. All of its processes must be gone within the grace time."""
    folder = config_file.parent / "runs" / name
    started = time.time()
    process = launch(config_file, name)
    while process.poll() is None and not any(b.stat().st_mtime > started for b in folder.glob("heartbeat/rank-*.json")):
        time.sleep(0.02)
    time.sleep(seconds)
    last = doing(folder, 0)
    running = processes(config_file, name)
    for who, p in running.items():
        if whom in (who, "everybody"):
            p.kill()
    finished = process.wait(90) == 0 and whom != "launch.sh"
    end = time.monotonic() + 90
    while left := processes(config_file, name):
        assert time.monotonic() < end, f"{whom} was killed while {last}; still there: {list(left)}"
        time.sleep(0.1)
    return None if finished and not running.keys() & {whom} and whom != "everybody" else last


def curve(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in line]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Bitwise: every logged figure once, TensorBoard's points, the checkpoint's tensors and the adapter."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for key in ("train/loss", "train/grad_norm", "train/lr", "eval/loss"):
        assert curve(folder, key) == curve(whole, key), key
        assert [(e.step, e.value) for e in board.Scalars(key)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in curve(whole, key)], key
    manifests = [json.loads((f / "checkpoints" / "newest" / "manifest.json").read_text()) for f in (folder, whole)]
    for key in ("step", "optimizer_step", "files", "rng", "identity"):
        assert manifests[0][key] == manifests[1][key], key
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    notes = [sorted(f.glob("samples/step-*.md")) for f in (folder, whole)]
    assert [p.read_text() for p in notes[0]] == [p.read_text() for p in notes[1]] and len(notes[0]) > 2
    assert not list(folder.glob("heartbeat/rank-*.json"))


def survive(config_file: Path, kills: int, seed: int, longest: float) -> None:
    """The run whole, and beside it one that is killed again and again, which must come to the same."""
    assert launch(config_file, "whole").wait(600) == 0, (config_file.parent / "whole.log").read_text()[-3000:]
    rng, done, seen = random.Random(seed), 0, []
    runs = config_file.parent / "runs"
    number = 0
    while done < kills:
        name = f"killed{number}"
        whom, seconds = WHOM[done % len(WHOM)], rng.uniform(0.0, longest)
        last = kill_at(config_file, name, whom, seconds)
        if last is not None:
            done += 1
            steps = [p.name for p in sorted((runs / name / "checkpoints").glob("step-*"))]
            seen.append(f"{whom} after {seconds:.1f} s, while {last}; checkpoints {', '.join(steps)}")
            print(seen[-1], flush=True)
        if (runs / name / "adapter").is_dir():  # it came to its end between the kills: on with another one
            assert launch(config_file, name).wait(600) == 0
            assert_same_run(runs / name, runs / "whole")
            number += 1
    name = f"killed{number}"
    assert launch(config_file, name).wait(600) == 0, (config_file.parent / f"{name}.log").read_text()[-3000:]
    assert_same_run(runs / name, runs / "whole")


def test_a_run_killed_now_and_then_ends_as_the_unbroken_one(config_file):
    survive(config_file, kills=2, seed=1, longest=3.0)


@pytest.mark.slow
def test_fifty_kills_change_nothing(config_file):
    survive(config_file, kills=int(os.environ.get("LOOP_KILLS", 50)), seed=int(os.environ.get("LOOP_SEED", 0)), longest=6.0)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_asked_to_stop_while_it_writes_a_note_it_saves_and_ends_well(config_file, number):
    """The wish comes in the middle of a note of 2,000 tokens, which breaks off."""
    name, folder = "noted", config_file.parent / "runs" / "noted"
    process = launch(config_file, name, "monitor.sample_max_new_tokens=2000", "max_seq_len=1024")
    while process.poll() is None and "note" not in doing(folder, 0):
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == 0, (config_file.parent / f"{name}.log").read_text()[-3000:]
    assert time.monotonic() - started < 20
