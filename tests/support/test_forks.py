"""The tests' fast `python` does what Python does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import AT_IMPORT, CPU
from helpers import PYTHON, ROOT, wait_until

START = """
import os, subprocess, sys
sys.path.insert(0, os.path.dirname({server!r}))
from fork_server import CPU, start_server
python = start_server(())
code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
print(python, flush=True)
subprocess.run([python, "-c", code], env=os.environ | CPU)
"""
SHOW = """
import __main__, os, sys
print(sys.argv, sys.path[0], __name__, __main__.__dict__ is globals(), os.getcwd())
print(sys.stdin.read(), os.environ["MARK"], len(os.environ))
print([name for name in ("torch", "deepspeed", "loop") if name in sys.modules], file=sys.stderr)
sys.exit(3)
"""


def python(*args: str, which: str = PYTHON, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | CPU | {"MARK": "m"} | env
    return subprocess.run(
        [which, *args], env=env, cwd=ROOT, input="typed", capture_output=True, text=True
    )


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_a_fork_is_as_a_true_python(tmp_path, how):
    (tmp_path / "shown.py").write_text(SHOW)
    args = {"-c": ["-c", SHOW], "-m": ["-m", "shown"], "file": [str(tmp_path / "shown.py")]}[how]
    fork, true = (
        python(*args, "a b", "é", which=which, PYTHONPATH=str(tmp_path))
        for which in (PYTHON, sys.executable)
    )
    assert fork.returncode == true.returncode == 3
    assert fork.stdout == true.stdout and "typed m" in fork.stdout
    assert (fork.stderr, true.stderr) == ("['torch', 'deepspeed']\n", "[]\n")


def test_what_a_fork_would_not_be_is_a_true_python():
    code = "import os, sys; print('torch' in sys.modules)"
    changes = [{f"{prefix}_X": "1"} for prefix in AT_IMPORT if prefix != "LD_"]
    for change in changes[::6]:
        assert python("-c", code, **change).stdout == "False\n", change
    assert python("-B", "-c", code).stdout == "False\n"
    assert python("-u", "-c", code).stdout == "True\n"


def test_a_process_that_has_imported_everything_still_gets_forks():
    """Libraries set variables of their own, which its children have, too."""
    code = """
import subprocess, sys
import datasets, loop.commands.train, torch._inductor.config
from loop.monitor.quiet import quiet_libraries
quiet_libraries()
print("loop" in sys.modules, flush=True)
subprocess.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"])
"""
    assert python("-c", code).stdout == "True\nTrue\n"


def test_signals_reach_a_fork_and_it_ends_with_its_client():
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print(os.getpid(), signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, flush=True)
while True: time.sleep(0.1)
"""
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    process = subprocess.Popen(
        [PYTHON, "-c", code], env=os.environ | CPU, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGUSR1, handler)
    pid, ignored = process.stdout.readline().split()
    assert ignored == "True" and Path("/proc", pid).exists()
    process.terminate()
    assert process.stdout.readline() == "asked\n"
    process.kill()
    wait_until(lambda: not Path("/proc", pid).exists(), 60)
    process.communicate()
    assert python("-c", "import os; os.kill(os.getpid(), 11)").returncode == -11


def test_nothing_is_left_of_killed_tests(tmp_path):
    """Neither the forks nor the server nor its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(server=str(ROOT / "tests/support/fork_server.py"))],
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = Path(process.stdout.readline()).parent
    fork = Path("/proc", process.stdout.readline().strip())
    assert folder.exists() and fork.exists()
    process.kill()
    wait_until(lambda: not folder.exists() and not fork.exists(), 60)
    process.communicate()
