"""A Ctrl-C that comes before a command can catch it."""

import signal
import subprocess
import sys

from helpers import ROOT


def test_a_ctrl_c_during_imports_is_one_word():
    program = "import loop.commands, os, signal; os.kill(os.getpid(), signal.SIGINT); input()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, input=""
    )
    assert done.stderr == "interrupted\n"
    assert done.returncode in (-signal.SIGINT, 130)


def test_any_other_error_keeps_its_traceback():
    program = "import loop.commands; loop.nothing"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "AttributeError" in done.stderr
    assert "Traceback" in done.stderr
    assert done.returncode == 1
