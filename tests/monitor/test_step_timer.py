"""Step timers add up, wait for nothing and cost little; `profile` says where a step's time goes."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, PYTHON, ROOT, run

from loop.monitor.kernel_profile import KINDS, STEPS, WARM_UP, busy_time, kernel_kind, profile_table
from loop.monitor.step_timer import PHASES, StepTimer


def test_phases_follow_each_other_and_a_phase_may_come_again():
    timer = StepTimer(torch.device("cpu"))
    began = time.perf_counter()
    timer.start()
    started = time.perf_counter()
    for name in ("forward", "backward", "forward", "backward", "optimizer", "sync"):
        time.sleep(0.01)
        timer.phase(name)
    ending = time.perf_counter()
    seconds = timer.stop()
    assert list(seconds) == list(PHASES)
    assert ending - started <= sum(seconds.values()) <= time.perf_counter() - began
    assert seconds["forward"] >= 0.02 and seconds["backward"] >= 0.02
    began = time.perf_counter()
    timer.start()
    again = sum(timer.stop().values())
    assert again <= time.perf_counter() - began, "the times of the step before are gone"


def test_on_a_gpu_only_the_step_end_is_waited_for(monkeypatch):
    """A queue 100 ms behind Python: the phases are the queue's, and nothing waits for it."""
    queue, waits = iter(range(100, 1000, 7)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(queue)  # ms, of the GPU's clock

        def synchronize(self):
            waits.append(self.at)

        def elapsed_time(self, end):
            assert waits, "an event is read before the GPU has come to it"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    timer.start()
    for name in ("forward", "backward", "optimizer", "sync"):
        timer.phase(name)
    assert not waits
    assert timer.stop() == dict.fromkeys(PHASES, pytest.approx(0.007)) and waits == [135]


def test_timing_a_step_costs_less_than_a_hundredth_of_the_shortest_step():
    """The shortest step of tests/bench/README.md is 91 ms; this one has four micro-batches."""
    timer = StepTimer(torch.device("cpu"))
    best = float("inf")
    for _ in range(200):
        began = time.perf_counter()
        timer.start()
        for name in ["forward", "backward"] * 4 + ["optimizer", "sync"]:
            timer.phase(name)
        timer.stop()
        best = min(best, time.perf_counter() - began)
    assert best < 0.01 * 0.091


def test_the_phases_of_a_real_run_add_up_to_its_steps(trained):
    """tokens_per_second goes by another clock than the phases."""
    log = (trained / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, log) if "train/loss" in line]
    assert len(lines) == 6
    budget = 4 * 512
    for line in lines:
        phases = [line[f"time/{name}"] for name in PHASES]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) * line["train/tokens_per_second"] <= budget * 1.01
    fastest = max(lines, key=lambda line: line["train/tokens_per_second"])
    seconds = sum(fastest[f"time/{name}"] for name in PHASES)
    assert seconds * fastest["train/tokens_per_second"] > 0.5 * budget


def test_kernels_have_kinds_and_overlap_counts_once():
    assert kernel_kind("ncclDevKernel_AllGather_RING_LL") == "communication"
    assert kernel_kind("flash_fwd_kernel") == "attention"
    assert kernel_kind("nvjet_tst_128x256_64x4") == "matrix products"
    assert kernel_kind("triton_poi") == "other"
    assert len({kind for kind, _ in KINDS}) == len(KINDS)
    assert busy_time([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7 and busy_time([]) == 0


def test_profile_writes_a_trace_of_three_steps_and_a_table(config_file):
    runs = config_file.parent / "runs"
    command = [
        str(ROOT / "launch.sh"),
        "profile",
        "--config",
        str(config_file),
        "max_seq_len=512",
        "batch_size=2",
    ]
    env = os.environ | CPU | {"LOOP_PYTHON": PYTHON}
    done = run(command, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = runs / "t" / "profile"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["table.txt", "trace.json"], "the steps' own run is gone"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    steps = {e["name"]: e for e in ranges if e["name"].startswith("step ")}
    assert set(steps) == {f"step {WARM_UP + i + 1}" for i in range(STEPS)}
    for step in steps.values():
        end = step["ts"] + step["dur"]
        inside = [e for e in ranges if e["name"] in PHASES and step["ts"] <= e["ts"] < end]
        assert {e["name"] for e in inside} == set(PHASES)
        assert sum(e["dur"] for e in inside) == pytest.approx(step["dur"], rel=0.05)
    table = (folder / "table.txt").read_text()
    assert table.strip() in done.stdout and "aten::mm" in table
    assert all(f"\n{name} " in table for name in PHASES)
    operators = table.split("operator, ")[1].splitlines()[1:]
    percentages = [float(line.rsplit(None, 1)[1].rstrip("%")) for line in operators]
    assert 90 < sum(percentages) < 110, "operators and what lies between them are the step"
    assert "Doctor" not in (folder / "trace.json").read_text()


def test_a_mistake_in_what_is_profiled_is_one_line(config_file):
    command = [PYTHON, "-m", "loop.commands.profile", "--config", str(config_file)]
    command.append("lr=none")
    done = run(command, cwd=ROOT, env=os.environ | CPU)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: lr")
        and done.stderr.count("\n") == 1
    )


def test_the_table_of_a_gpu_names_kinds_kernels_and_idle_time():
    def kernel(name, start, end):
        return SimpleNamespace(
            name=name,
            device_type=torch.autograd.DeviceType.CUDA,
            self_device_time_total=end - start,
            time_range=SimpleNamespace(start=start, end=end),
        )

    kernels = [
        kernel("nvjet_a", 0, 30_000),
        kernel("ncclDevKernel", 15_000, 45_000),
        kernel("forward", 0, 90_000),  # a range
    ]  # us
    # 20 ms a step, so 60 ms recorded, of which 45 are busy
    steps = [dict.fromkeys(PHASES, 0.004)] * (WARM_UP + STEPS)
    table = profile_table(SimpleNamespace(events=lambda: kernels), steps)
    lines = {line.split("  ")[0]: line.split() for line in table.splitlines() if line}
    assert lines["matrix products"][-2:] == lines["communication"][-2:] == ["10.0", "50.0%"]
    assert lines["nothing but communication runs"][-2:] == ["5.0", "25.0%"], "what no product hides"
    assert lines["no kernel runs"][-2:] == ["5.0", "25.0%"]
