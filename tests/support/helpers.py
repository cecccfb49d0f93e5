"""What the tests share: ways to run code on several ranks, and made-up examples of very unequal
length.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fork_server import CPU

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (ROOT / "launch.sh").read_text()
LAUNCH_COMMANDS = " ".join(
    re.findall(r'^commands\+?="(.*)"$', LAUNCH, re.M)
).split()  # of launch.sh
SHARED = ROOT.parent / "shared"  # real dialogues, where the machine has them
# Starts fast, with the libraries imported: fork_server.py. sys.executable is a true Python.
PYTHON = os.environ.get("LOOP_TESTS_PYTHON", sys.executable)


def machine_share() -> float:
    """The part of a core that a process gets: 1 on an idle machine, less beside other programs."""
    return min(1.0, len(os.sched_getaffinity(0)) / max(os.getloadavg()[0], 1.0))


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Waits for what takes at most so many seconds on an idle machine.

    Limits of tests are limits of work: on a busy machine, where it takes longer, so does the limit.
    """
    while not condition():
        assert seconds > 0, "it did not happen in time"
        started = time.monotonic()
        time.sleep(0.02)
        seconds -= (time.monotonic() - started) * machine_share()


def communicate(process: subprocess.Popen, seconds: float, text: str | None = None) -> tuple:
    """process.communicate(text) within a limit as that of `wait_until`.

    Raises subprocess.TimeoutExpired.
    """
    while True:
        try:
            return process.communicate(text, timeout=1)
        except subprocess.TimeoutExpired:
            text = None  # it is on its way
            seconds -= machine_share()
            if seconds <= 0:
                raise


def ends_within(process: subprocess.Popen, seconds: float) -> int:
    """The exit code of a process, which ends within a limit as that of `wait_until`."""
    wait_until(lambda: process.poll() is not None, seconds)
    return process.returncode


def run(
    command: list[str], seconds: float = 300, text: str | None = None, **options
) -> subprocess.CompletedProcess:
    """subprocess.run with its output as text, within a limit as that of `wait_until`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes, **options)
    try:
        output = communicate(process, seconds, text)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *output)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(
    world_size: int, *command: str, gpu: bool = False, **env: str
) -> list[subprocess.Popen]:
    """Starts `python COMMAND...` as `world_size` ranks (gloo, or NCCL with gpu)."""
    folders = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "proofs"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    common |= ({} if gpu else CPU) | env
    return [
        subprocess.Popen(
            [PYTHON, *command],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world_size)
    ]


def run_ranks(
    world_size: int, *command: str, seconds: float = 300, **options
) -> list[subprocess.CompletedProcess]:
    """start_ranks; returns the finished processes by rank. A rank that hangs fails the test."""
    processes = start_ranks(world_size, *command, **options)
    try:
        outputs = [communicate(p, seconds) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *out)
        for p, out in zip(processes, outputs)
    ]


def run_ok(world_size: int, *command: str, **options) -> str:
    """run_ranks, all of which must end with 0; returns rank 0's standard output."""
    done = run_ranks(world_size, *command, **options)
    for rank, p in enumerate(done):
        assert p.returncode == 0, f"rank {rank} ended with {p.returncode}:\n{p.stderr[-3000:]}"
    return done[0].stdout


def tinyllama_shape():
    """The published configuration of TinyLlama/TinyLlama-1.1B-Chat-v1.0."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def write_rows(path: Path, prefix: str, count: int, seed: int, longest: int = 8) -> str:
    """Made-up dialogues and notes; notes of 1 to some 200 tokens, so that their numbers of targets
    are very unequal.
    """
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            turns = [
                f"Doctor: {rng.randint(0, 999)}?\nPatient: pain {rng.randint(0, 99)}"
                for _ in range(rng.randint(1, longest))
            ]
            if i % 3 == 0:
                note = f"S: {rng.randint(0, 9)}"
            else:
                numbers = " ".join(str(rng.random()) for _ in range(rng.randint(1, 9)))
                note = f"S: pain\nO: {numbers}\nA: a\nP: p"
            file.write(
                json.dumps({"id": f"{prefix}-{i}", "dialogue": "\n".join(turns), "soap": note})
                + "\n"
            )
    return str(path)


def seed_profile(n: int, seed: int = 0) -> np.ndarray:
    """Lengths as in the seed configuration's data."""
    return np.clip(np.random.default_rng(seed).normal(1463, 350, n), 64, 2048).astype(np.int32)


def bf16_file(folder: Path) -> str:
    """A DeepSpeed file in the folder that computes in bf16, whatever this CPU is fast in."""
    path = folder / "bf16.json"
    ds_config = json.loads((ROOT / "ds_config.json").read_text())
    path.write_text(json.dumps(ds_config | {"bf16": {"enabled": True}}))
    return str(path)


def note_disk_operations(monkeypatch, move: str) -> list[tuple[str, str]]:
    """A list that grows: ("fsync" or `move`, the name that is made safe or given).

    move: of Path, "rename" or "replace".
    """
    done: list[tuple[str, str]] = []
    sync, moved = os.fsync, getattr(Path, move)

    def noted_sync(descriptor):
        done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def noted_move(self, target):
        done.append((move, os.path.basename(target)))
        return moved(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, move, noted_move)
    return done
