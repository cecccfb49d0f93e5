"""Two "hosts" on one machine: two launchers with node ranks.

Each has a PID namespace of its own where that is allowed, so that neither can look at the other's
processes. How one ./launch.sh reaches both: test_launcher.py.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest
from helpers import ROOT, communicate, free_port
from test_watchdog import wait_until_doing

APART = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
if not shutil.which("unshare") or subprocess.run([*APART, "true"], capture_output=True).returncode:
    APART = []

OTHERS = [("settings", "lr"), ("code", "code of loop/")]  # what differs, and how it is named


class Hosts:
    """The launchers of one run; `start(node, *args)` starts one with these arguments for train."""

    def __init__(self, config_file):
        self.config_file = config_file
        self.port = str(free_port())
        self.started = []
        self.hostfile = config_file.parent / "hosts"
        self.hostfile.write_text("one slots=1\ntwo slots=1\n")

    def start(self, node: int, *args: str, root=ROOT) -> subprocess.Popen:
        env = os.environ | {
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port,
        }
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            env.pop(name, None)
        command = [
            sys.executable,
            "-m",
            "loop.distributed.launcher",
            "train",
            f"--hostfile={self.hostfile}",
            f"--node-rank={node}",
            "--config",
            str(self.config_file),
            *args,
        ]
        process = subprocess.Popen(
            [*APART, *command],
            cwd=root,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process


@pytest.fixture()
def hosts(config_file):
    found = Hosts(config_file)
    yield found
    for process in found.started:
        process.kill()


def ends(process: subprocess.Popen, within: float) -> tuple[int, str]:
    out, err = communicate(process, within)
    return process.returncode, out + err


def test_a_host_that_starts_late_is_waited_for(hosts):
    first = hosts.start(0, "max_steps=2")
    time.sleep(8)
    second = hosts.start(1, "max_steps=2")
    for process in (first, second):
        code, output = ends(process, 180)
        assert code == 0, output[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "started, says",
    [
        (0, "error: rank 1 of 2 did not come within run.rendezvous_timeout_minutes=0.1"),
        (1, "gave no answer within run.rendezvous_timeout_minutes=0.1; is rank 0 started"),
    ],
)
def test_the_machine_that_never_starts_is_named(hosts, started, says):
    process = hosts.start(started, "max_steps=2", "run.rendezvous_timeout_minutes=0.1")
    code, output = ends(process, 120)
    assert code == 1 and says in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("what", "named"),
    [("data", "examples"), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_a_host_with_something_else_is_refused_on_both(hosts, tmp_path, what, named):
    root, more = ROOT, []
    if what == "code":
        root = tmp_path / "other"
        shutil.copytree(ROOT / "loop", root / "loop", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "ds_config.json", root)
        with (root / "loop" / "data" / "soap.py").open("a") as file:
            file.write("\n# changed\n")
    else:
        more = ["lr=2e-3"] if what == "settings" else ["data.limit=20"]
    both = [hosts.start(0, "max_steps=2"), hosts.start(1, "max_steps=2", *more, root=root)]
    for process, rank in zip(both, (0, 1)):
        code, output = ends(process, 120)
        assert code == 2, output[-2000:]
        if rank == 0:
            assert f"error: rank 1 has another {named} than rank 0" in output
            assert "Traceback" not in output


def test_a_host_that_dies_ends_the_other(hosts, config_file):
    """All of its processes at once, as when the machine goes. The one left says so and ends."""
    folder = config_file.parent / "runs" / "t"
    options = ("epochs=40", "run.heartbeat_timeout_minutes=0.1")
    first, second = (hosts.start(node, *options) for node in (0, 1))
    wait_until_doing(folder, 1, "micro-batch", step=4)
    if APART:
        second.kill()  # --kill-child: the namespace goes with it
    else:
        subprocess.run(["pkill", "-KILL", "-P", str(second.pid)], check=True)
        second.kill()
    code, output = ends(first, 60)
    assert code != 0 and "rank 1" in output, output[-2000:]
