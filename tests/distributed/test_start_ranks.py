"""The parent of a machine's ranks."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, communicate

from loop.distributed import start_ranks
from loop.distributed.start_ranks import rank_environments

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
if rank == 1 and sys.argv[1] == "fail":
    sys.exit(3)
if rank == 1 and sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
os.write(1, f"{rank}\\n".encode())  # at once: the lines of two ranks must not mix
if sys.argv[1] != "end":
    time.sleep(60)
"""


def test_what_the_ranks_of_a_second_machine_find():
    hosts = {"one": [0, 1, 2], "two": [4, 6]}
    spec = {"hosts": hosts, "node": 1, "address": "one", "port": 29500}
    first, second = rank_environments(spec)
    assert (first["RANK"], first["LOCAL_RANK"]) == ("3", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("4", "1")
    for rank in (first, second):
        assert rank["WORLD_SIZE"] == "5" and rank["CUDA_VISIBLE_DEVICES"] == "4,6"
        assert (rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("one", "29500")
        assert rank["LOCAL_SIZE"] == rank["CROSS_SIZE"] == "2" and rank["CROSS_RANK"] == "1"


@pytest.mark.parametrize(
    "how, code", [("end", 0), ("fail", 3), ("die", 256 - 9), ("wait", 256 - 15)]
)
def test_one_that_ends_badly_ends_them_all(tmp_path, how, code):
    (tmp_path / "rank.py").write_text(RANK)
    spec = {"hosts": {"here": [0, 1]}, "node": 0, "address": "127.0.0.1", "port": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "loop.distributed.start_ranks", json.dumps(spec), "rank", how],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if how == "wait":
        assert {process.stdout.readline(), process.stdout.readline()} == {"0\n", "1\n"}
        process.send_signal(signal.SIGTERM)
    communicate(process, 25)  # the ranks hold the pipe: they have ended, too
    assert process.returncode == code


def test_a_rank_that_does_not_end_in_its_grace_time_is_killed(monkeypatch):
    class Rank:
        def __init__(self, ends: bool) -> None:
            self.ends, self.did = ends, []

        def terminate(self) -> None:
            self.did.append("terminate")

        def wait(self, seconds: float) -> None:
            if not self.ends:
                raise subprocess.TimeoutExpired("rank", seconds)

        def kill(self) -> None:
            self.did.append("kill")

    monkeypatch.setattr(start_ranks.signal, "signal", lambda *args: None)
    ranks = start_ranks.RankProcesses()
    ranks.running = [Rank(ends=False), Rank(ends=True)]
    with pytest.raises(SystemExit, match="9"):
        ranks.end(9)
    assert [rank.did for rank in ranks.running] == [["terminate", "kill"], ["terminate"]]
