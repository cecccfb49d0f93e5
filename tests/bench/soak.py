"""`python tests/bench/soak.py [STEPS [SECONDS]]`: many steps of a tiny run: does anything grow?

It trains the embedded base on two CPU ranks and looks at each rank's resident memory, open files,
threads and CPU time every few seconds. It prints their slopes over the second half of the run, and
ends with 1 where one of them is not flat. The time of a step by the clock stands beside them, as it
grows with other work on the machine. After SECONDS the run is asked to save and end, and what it
did by then is what counts.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
LOOK_SECONDS = 5
# What may be added in 1,000 steps: noise of the allocator, and of other work on the machine.
MOST = {"MiB resident": 2.0, "open files": 0.01, "threads": 0.01, "CPU ms a step": 2.0}


def start(folder: Path, steps: int) -> subprocess.Popen:
    """Starts the run in a folder, two ranks of a tiny configuration."""
    rng = random.Random(0)  # for dialogues that don't resemble each other
    rows = [
        {
            "id": str(i),
            "dialogue": "\n".join(f"Doctor: {rng.random()}?" for _ in range(1 + i % 4)),
            "soap": "S: a\nO: b\nA: c\nP: d",
        }
        for i in range(64)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *(f"data.train={folder / 'rows.jsonl'}", "data.valid=null", "data.test=null"),
        *("max_seq_len=256", "batch_size=1", "epochs=10000", f"max_steps={steps}"),
        *(f"run.dir={folder}", "run.name=soak", "run.save_steps=500", "run.export=none"),
        *("monitor.sample_notes=[]", "warmup_steps=0"),
    ]
    config = ROOT / "loop/configs/embedded.yaml"
    command = [str(ROOT / "launch.sh"), "train", "--gpus", "2", "--config", str(config), *settings]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env.setdefault("LOOP_PYTHON", sys.executable)
    log = (folder / "log").open("w")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def look(process: subprocess.Popen) -> dict[str, tuple[float, ...]]:
    """(MiB resident, open files, threads, ms of CPU time so far) of each rank that runs now."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            rank = child.environ().get("RANK")
            if rank is not None and child.environ().get("LOCAL_RANK") is not None:
                mib = child.memory_info().rss / 2**20
                cpu = 1000 * sum(child.cpu_times()[:2])
                found.setdefault(f"rank {rank}", (mib, child.num_fds(), child.num_threads(), cpu))
        except psutil.Error:
            continue
    return found


def read_steps(folder: Path) -> list[dict]:
    log = folder / "soak" / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [line for line in map(json.loads, lines) if "train/loss" in line]


def rates(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(step, rise a step until then) of (step, a sum so far), where steps were made meanwhile."""
    moved = [point for i, point in enumerate(points) if not i or point[0] > points[i - 1][0]]
    return [
        (step, (value - before) / (step - begun))
        for (begun, before), (step, value) in zip(moved, moved[1:])
    ]


def slope(points: list[tuple[float, float]]) -> float:
    """The rise in 1,000 steps over the second half of (step, value), by least squares."""
    half = points[len(points) // 2 :]
    steps, values = np.array(half).T
    return float(np.polyfit(steps, values, 1)[0] * 1000)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    end = time.monotonic() + (float(sys.argv[2]) if len(sys.argv) > 2 else float("inf"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(folder, steps)
        seen: dict[str, list[tuple[float, tuple[float, ...]]]] = {}
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            if time.monotonic() > end:
                process.terminate()
                end = float("inf")
            log = folder / "soak" / "metrics.jsonl"
            step = log.read_bytes().count(b'"train/loss"') if log.is_file() else 0
            if step:
                for rank, values in look(process).items():
                    seen.setdefault(rank, []).append((step, values))
        if process.returncode or not seen:
            sys.exit((folder / "log").read_text()[-3000:])
        times = [
            (line["step"], 1000 * sum(v for k, v in line.items() if k.startswith("time/")))
            for line in read_steps(folder)
        ]
    rows = [("rank 0", "ms a step", times)]
    for rank, looks in sorted(seen.items()):
        for i, what in enumerate(("MiB resident", "open files", "threads")):
            rows.append((rank, what, [(step, values[i]) for step, values in looks]))
        rows.append((rank, "CPU ms a step", rates([(step, values[3]) for step, values in looks])))
    grows = False
    print(f"{len(times):,} of {steps:,} steps")
    print(f"{'':8s}{'':14s}{'first':>10s}{'last':>10s}{'in 1,000 steps':>16s}")
    for rank, what, points in rows:
        rise = slope(points)
        grows |= rise > MOST.get(what, np.inf)
        print(f"{rank:8s}{what:14s}{points[0][1]:10.1f}{points[-1][1]:10.1f}{rise:16.3f}")
    sys.exit(int(grows))


if __name__ == "__main__":
    main()
