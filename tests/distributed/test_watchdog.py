"""Ranks end together: on a signal to one, at the time limit, when one is gone or stands still."""

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import CPU, PYTHON, ROOT, communicate, ends_within, start_ranks, wait_until

from loop.config.schema import RunConfig
from loop.distributed import stop, watchdog
from loop.distributed.watchdog import RankLost, Watchdog, set_activity


def start(config_file, *args: str, world_size: int = 2) -> list[subprocess.Popen]:
    command = ["-m", "loop.train", "--config", str(config_file), *args]
    return start_ranks(world_size, *command)


def wait_until_doing(folder, rank: int, words: str, step: int) -> None:
    def is_doing() -> bool:
        try:
            beat = json.loads((folder / "heartbeat" / f"rank-{rank}.json").read_text())
            return beat["step"] >= step and words in beat["doing"]
        except (OSError, ValueError):
            return False

    wait_until(is_doing, 120)


def finish(ranks: list[subprocess.Popen], seconds: float = 120) -> list[str]:
    try:
        return ["".join(communicate(p, seconds)) for p in ranks]
    finally:
        for p in ranks:
            p.kill()


def test_a_signal_to_one_rank_in_a_note_saves_and_ends_all_and_the_next_run_does_the_note_again(
    config_file,
):
    run_dir = config_file.parent / "runs" / "t"
    sample = run_dir / "samples" / "step-000003.md"
    args = [
        "epochs=40",
        "monitor.sample_notes=[valid-1, valid-2, valid-3, valid-4]",  # two for each rank
        "generation.max_new_tokens=300",
    ]
    ranks = start(config_file, *args)
    wait_until_doing(run_dir, 1, "writing notes", step=3)
    # It stops at once; rank 0 writes its note to the end and learns of it then.
    ranks[1].send_signal(signal.SIGTERM)
    output = finish(ranks)
    assert [p.returncode for p in ranks] == [0, 0], output
    assert "asked to stop (another rank was): saved after step 3" in output[0]
    manifest = json.loads((run_dir / "checkpoints" / "newest" / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["figures"] is None and not sample.exists()
    again = start(config_file, *args)
    wait_until_doing(run_dir, 0, "micro-batch", step=5)
    again[0].send_signal(signal.SIGINT)
    output = finish(again)
    assert [p.returncode for p in again] == [0, 0], output
    assert f"resumed from {run_dir}/checkpoints/step-000003" in output[0], output
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line][:2] == [0, 3]
    assert sample.exists()
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 5


def python(code: str, **env: str):
    process = subprocess.Popen(
        [PYTHON, "-c", code],
        cwd=ROOT,
        env=os.environ | CPU | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


SHOW_REASON = """
import time
from loop.distributed.stop import StopRequest

request = StopRequest()
print("up", flush=True)
while True:
    time.sleep(0.05)
    if request.reason:
        print(request.reason, flush=True)
"""


def test_a_run_whose_launcher_was_killed_is_asked_to_stop():
    process = python(SHOW_REASON, LOOP_LAUNCHER_PID=str(os.getpid()))
    lost = python(SHOW_REASON, LOOP_LAUNCHER_PID=str(dead_pid()))
    try:
        wait_until(lambda: select.select([lost.stdout], [], [], 0)[0], 30)
        assert lost.stdout.readline() == "SIGTERM\n"
        process.send_signal(signal.SIGUSR1)  # its launcher is here
        assert process.stdout.readline() == "SIGUSR1\n"
    finally:
        for each in (process, lost):
            each.kill()


def test_a_second_signal_stops_at_once():
    """A repeat within three seconds is the same Ctrl-C; a later one means now."""
    process = python(SHOW_REASON)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    for _ in range(20):  # a second of its own time
        assert process.stdout.readline() == "SIGUSR1\n"
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    assert ends_within(process, 10) == 128 + signal.SIGTERM
    process.stdout.close()


NO_STEP_ENDS = """
import time
from loop.distributed.stop import StopRequest

StopRequest()
print("up", flush=True)
time.sleep(100)
"""


def test_a_step_that_never_ends_is_ended_after_the_grace_time():
    process = python(NO_STEP_ENDS, LOOP_GRACE_SECONDS="1")
    process.send_signal(signal.SIGTERM)
    assert ends_within(process, 15) == 1
    process.stdout.close()


def test_the_time_limit_is_a_request_to_stop(monkeypatch):
    # A real thread would end the tests' process after the grace time.
    monkeypatch.setattr(stop.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(stop.signal, "signal", lambda *_: None)
    assert stop.StopRequest(max_hours=1000).reason is None
    assert stop.StopRequest().reason is None
    assert stop.StopRequest(max_hours=1e-12).reason == "run.max_hours"


@pytest.fixture
def dog(tmp_path, monkeypatch):
    """The watchdog of rank 0 of 2, with a limit of a minute, not yet entered.

    What would end the process is noted instead.
    """
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    alone = SimpleNamespace(rank=0, world_size=2, all_gather_json=lambda value: [value])
    it = Watchdog(tmp_path, alone, RunConfig(stall_timeout_minutes=1.0))
    it.ended = ended
    it.folder.mkdir()
    return it


def other_rank(dog, **changes) -> None:
    now = {
        "rank": 1,
        "step": 7,
        "doing": "micro-batch 2 of 3",
        "turns": 5,
        "since": time.monotonic(),
        "alive": time.monotonic(),
    }
    (dog.folder / "rank-1.json").write_text(json.dumps(dog.me | now | changes))


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_rank_that_died_is_named_with_its_step_and_last_deed(dog):
    other_rank(dog)
    assert dog._find_lost(dog._others()) is None
    other_rank(dog, pid=dead_pid())
    lost = dog._find_lost(dog._others())
    assert "rank 1 (pid" in lost and "died in step 7 (micro-batch 2 of 3, for 0 s)" in lost
    other_rank(dog, pid=dead_pid(), token=1)  # what an earlier run left
    assert dog._find_lost(dog._others()) is None
    other_rank(dog, pid=dead_pid(), host="another")  # its processes can't be looked at
    assert dog._find_lost(dog._others()) is None
    other_rank(dog, ended="OutOfMemoryError", host="another")
    assert dog._find_lost(dog._others()).startswith("rank 1 ended with OutOfMemoryError in step 7")


def test_the_rank_that_all_wait_for_is_named(dog, monkeypatch):
    ago = time.monotonic() - 100
    activity = {"step": 7, "doing": "clipping and updating", "turns": 9, "since": ago}
    monkeypatch.setattr(watchdog, "_activity", activity)
    other_rank(dog, since=ago)  # it has come less far than this one
    assert dog._find_stalled().startswith(
        "rank 1 stands still in step 7 (micro-batch 2 of 3, for 100 s)"
    )
    other_rank(dog, since=ago, turns=12)
    assert dog._find_stalled().startswith("rank 0 stands still in step 7 (clipping and updating")
    other_rank(dog, since=ago, turns=12, alive=ago)  # frozen: not even its watchdog writes
    assert dog._find_stalled().startswith("rank 1 stands still")
    set_activity("the next thing")
    assert dog._find_stalled() is None


def test_a_lost_rank_ends_this_one_and_a_good_end_leaves_no_file(dog, capfd):
    with dog:
        assert (dog.folder / "rank-0.json").is_file()
    assert not (dog.folder / "rank-0.json").exists() and not dog.ended
    dog.over.clear()
    other_rank(dog, pid=dead_pid())
    with dog:
        wait_until(lambda: dog.ended, 10)
    assert dog.ended[0] == 1 and "error: rank 1 (pid" in capfd.readouterr().err


def test_what_one_rank_finds_all_are_told(dog, capfd):
    """Each rank reads the next one's file and one for all, not everybody's."""
    dog.ranks.world_size = 9
    other_rank(dog)
    beat = json.loads((dog.folder / "rank-1.json").read_text())
    found_by_rank_4 = beat | {"rank": 5, "pid": dead_pid()}
    (dog.folder / "rank-5.json").write_text(json.dumps(found_by_rank_4))
    with dog:
        time.sleep(1.5)
        assert not dog.ended
        (dog.folder / "lost.json").write_text(json.dumps(beat | {"rank": 4, "lost": "rank 5 died"}))
        wait_until(lambda: dog.ended, 10)
    assert dog.ended[0] == 1 and "error: rank 5 died; rank 0 ends in step" in capfd.readouterr().err
    assert json.loads((dog.folder / "lost.json").read_text())["rank"] == 0  # it tells in turn


def test_a_collective_that_fails_with_another_rank_is_that_ranks_loss(dog):
    other_rank(dog, pid=dead_pid())
    with pytest.raises(RankLost, match="rank 1 .* died in step 7"), dog:
        raise RuntimeError(
            "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
        )
    dog.over.clear()
    # Its own error, after which the other ended.
    with pytest.raises(RuntimeError, match="out of memory"), dog:
        raise RuntimeError("out of memory")


def test_who_died_is_named_before_who_ended_for_it(dog):
    other_rank(dog, ended="RuntimeError")
    beat = json.loads((dog.folder / "rank-1.json").read_text())
    del beat["ended"]
    (dog.folder / "rank-2.json").write_text(json.dumps(beat | {"rank": 2, "pid": dead_pid()}))
    assert dog._find_lost(dog._others()).startswith("rank 2 (pid")


def test_a_failed_rank_says_so_in_its_file(dog):
    with pytest.raises(ValueError), dog:
        raise ValueError
    assert json.loads((dog.folder / "rank-0.json").read_text())["ended"] == "ValueError"


def test_time_in_which_the_machine_was_suspended_makes_no_rank_late(dog, monkeypatch):
    """The clock goes on for 15 minutes between two turns of the watchdog."""
    set_activity("micro-batch 1 of 3")
    other_rank(dog, host="another")
    assert dog._find_lost(dog._others()) is None
    last_turn, now = time.monotonic(), time.monotonic() + 900
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    assert "nothing is heard from rank 1" in dog._find_lost(dog._others())
    assert dog._find_stalled() is not None
    dog._forgive_pause(last_turn)
    assert dog._find_lost(dog._others()) is None and dog._find_stalled() is None


def test_a_clock_that_is_set_makes_no_rank_late(dog, monkeypatch):
    other_rank(dog, host="another")
    assert dog._find_lost(dog._others()) is None
    monkeypatch.setattr(watchdog.time, "time", lambda: 0.0)
    assert dog._find_lost(dog._others()) is None and dog._find_stalled() is None


def test_a_rank_that_writes_to_a_full_disk_is_heard(dog, monkeypatch):
    path = dog._file(0)
    dog._write(path)
    os.utime(path, (0, 0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    dog._write(path)
    assert path.stat().st_mtime > time.time() - 60
    assert json.loads(path.read_text())["rank"] == 0


@pytest.mark.slow
def test_a_frozen_rank_ends_all_within_the_limit_and_the_next_run_goes_on(config_file):
    """SIGSTOP: no exit code, no closed connection, nothing but silence."""
    folder = config_file.parent / "runs" / "t"
    ranks = start(config_file, "epochs=40", "run.stall_timeout_minutes=0.2")
    wait_until_doing(folder, 1, "micro-batch", step=4)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        assert ends_within(ranks[0], 12 + 10) == 1
        assert "error: rank 1 stands still in step" in ranks[0].stderr.read()
    finally:
        ranks[1].kill()
        finish(ranks)
    again = start(config_file, "epochs=40")
    wait_until_doing(folder, 0, "micro-batch", step=6)
    again[0].send_signal(signal.SIGINT)
    assert "resumed from" in finish(again)[0]


def test_hours_are_hours_since_the_process_began(monkeypatch):
    monkeypatch.setattr(stop.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(stop.signal, "signal", lambda *_: None)
    began = time.time() - 600
    this = SimpleNamespace(create_time=lambda: began)
    monkeypatch.setattr(stop.psutil, "Process", lambda: this)
    clock = [1000.0]  # that of the machine's start, which nobody can set
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    request = stop.StopRequest(max_hours=2.0)
    for seconds, reason in ((2 * 3600 - 600 - 9, None), (2 * 3600 - 600 + 9, "run.max_hours")):
        clock[0] = 1000.0 + seconds
        assert request.reason == reason


def test_silence_of_another_machine_is_found_by_this_ones_clock(dog, monkeypatch):
    """The other's clock may be hours off: what counts is when its file last changed here."""
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    assert dog.heartbeat_seconds == 60 and dog.stall_seconds == 60
    other_rank(dog, host="far 1", alive=5.0)
    assert dog._find_lost(dog._others()) is None
    now[0] += 59
    assert dog._find_lost(dog._others()) is None
    other_rank(dog, host="far 1", alive=6.0)  # it wrote once more
    assert dog._find_lost(dog._others()) is None
    now[0] += 61
    lost = dog._find_lost(dog._others())
    assert lost.startswith("nothing is heard from rank 1 on far any more; it was in step 7")


def test_a_zombie_is_dead(dog):
    """Its parent has not asked for its exit code yet: the pid is still there."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(process.pid)
    other_rank(dog, pid=process.pid)
    assert "died in step 7" in dog._find_lost(dog._others())
    process.wait()
