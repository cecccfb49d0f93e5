"""Ranks end together: on a signal to one of them, and when whoever started them is gone."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, free_port


def start(config_file, *args: str, world_size: int = 2, **env: str) -> list[subprocess.Popen]:
    port = str(free_port())
    ranks = []
    for rank in range(world_size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "loop.train", "--config", str(config_file), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | place | quiet | env, **pipes))
    return ranks


def wait_for_steps(config_file, count: int) -> int:
    log = config_file.parent / "runs" / "t" / "metrics.jsonl"
    for _ in range(1200):
        done = [line for line in (log.read_text().splitlines() if log.exists() else []) if "train/loss" in line]
        if len(done) >= count:
            return len(done)
        time.sleep(0.1)
    raise AssertionError("the run made no steps")


def finish(ranks: list[subprocess.Popen], timeout: float = 120) -> list[str]:
    try:
        return ["".join(p.communicate(timeout=timeout)) for p in ranks]
    finally:
        for p in ranks:
            p.kill()


def test_a_signal_to_one_rank_saves_and_ends_all_and_the_next_run_goes_on(config_file):
    ranks = start(config_file, "epochs=40")
    wait_for_steps(config_file, 2)
    ranks[1].send_signal(signal.SIGTERM)  # rank 0 learns of it from the all-reduce
    output = finish(ranks)
    assert [p.returncode for p in ranks] == [0, 0], output
    assert "asked to stop: saved after step" in output[0]
    folder = config_file.parent / "runs" / "t"
    (last,) = (json.loads((p / "manifest.json").read_text())["step"] for p in sorted((folder / "checkpoints").iterdir())[-1:])
    assert last == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    again = start(config_file, "epochs=40")
    wait_for_steps(config_file, last + 2)
    again[0].send_signal(signal.SIGINT)
    output = finish(again)
    assert [p.returncode for p in again] == [0, 0] and f"resumed from {folder}/checkpoints/step-{last:06d}" in output[0]


def test_ranks_end_when_the_launcher_is_gone(config_file):
    launcher = subprocess.Popen(["sleep", "1000"])
    (rank,) = start(config_file, "epochs=40", world_size=1, LOOP_LAUNCHER_PID=str(launcher.pid))
    wait_for_steps(config_file, 2)
    launcher.kill()
    launcher.wait()
    output = finish([rank])
    assert rank.returncode == 0 and "asked to stop" in output[0]


def test_a_second_signal_stops_at_once():
    """The first is a wish; a repeat within three seconds is the same Ctrl-C, a later one means now."""
    code = (
        "import time; from loop.watchdog import StopRequest; s = StopRequest(); print('up', flush=True)\n"
        "while True: time.sleep(0.05); s.signal and print(s.signal, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    process.stdout.close()


def test_a_step_that_never_ends_is_ended_after_the_grace_time():
    code = "import time; from loop.watchdog import StopRequest; StopRequest(); print('up', flush=True); time.sleep(100)"
    env = os.environ | {"LOOP_GRACE_SECONDS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 1
    process.stdout.close()


@pytest.mark.parametrize("seed", [0, 2**40])
def test_seeding_repeats_every_generator(seed):
    import random

    import numpy as np
    import torch

    from loop.distributed import seed_everything

    draws = []
    for _ in range(2):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
