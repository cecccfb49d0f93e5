"""Standard streams that nobody reads, that are full, or that can't show a character."""

import os
import subprocess
import sys

import pytest
from helpers import PYTHON, ROOT

CODE = """
import sys
import loop.commands
from loop.distributed.exit import guard_streams
guard_streams(output_is_log={is_log})
print("x" * 10**5, "\\u2588\\ud83d")
print("said", file=sys.stderr)
{body}
"""


def run(body, is_log=False, redirected="", **env) -> subprocess.CompletedProcess:
    """Python with guarded streams, as the shell redirects them."""
    code = CODE.format(is_log=is_log, body=body)
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirected}', sys.executable, code],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("redirected", ["| true; exit ${PIPESTATUS[0]}", "2>/dev/full"])
def test_a_reader_who_has_gone_is_no_failure(redirected, tmp_path):
    """As under `| head -1`: what is to be saved is saved. A full log is none either."""
    done = run(f"open({str(tmp_path / 'saved')!r}, 'w')", redirected=redirected)
    assert (done.returncode, done.stderr) == (0, "" if "full" in redirected else "said\n")
    assert (tmp_path / "saved").exists()


def test_a_full_disk_loses_what_was_asked_for_and_says_so_in_a_line():
    done = run("", redirected=">/dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"
    log = run("", is_log=True, redirected=">/dev/full")
    assert (log.returncode, log.stderr) == (0, "said\n")


def test_another_error_is_still_one():
    done = run("open('/no/such/file')")
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr


def test_what_a_stream_can_not_show_is_an_escape():
    done = run("", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.stdout.endswith("x \\u2588\\ud83d\n")


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    """What a library prints would stand in a checkpoint."""
    fake = tmp_path / "python"
    code = "import os; print(*map(os.readlink, map('/proc/self/fd/{}'.format, range(3))))"
    code = f"import sys; sys.stdout = open({str(tmp_path / 'streams')!r}, 'w'); {code}"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "{code}"\n')
    fake.chmod(0o700)
    command = f"{ROOT}/launch.sh plan {closed}"
    env = os.environ | {"LOOP_PYTHON": str(fake)}
    assert subprocess.run(["bash", "-c", command], env=env).returncode == 0
    streams = (tmp_path / "streams").read_text()
    assert streams.count("/dev/null") == closed.count("-")


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "PYTHONIOENCODING"])
def test_what_keeps_python_from_starting_is_named(name):
    env = os.environ | {"LOOP_PYTHON": PYTHON, name: "abc"}
    done = subprocess.run([ROOT / "launch.sh", "plan"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"launch.sh: Python does not start with {name}=abc; unset it\n"


@pytest.mark.parametrize(
    ("name", "value"), [("HF_HUB_DOWNLOAD_TIMEOUT", "abc"), ("TORCH_DISTRIBUTED_DEBUG", "garbage")]
)
def test_a_variable_with_which_a_library_can_not_be_imported_is_named(name, value):
    code = "import loop.commands, torch.distributed, huggingface_hub.constants"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {name: value, "PYTHONSAFEPATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert name in done.stderr.split(": a library can't be imported with that (")[0]


def test_a_hook_of_torch_puts_no_rank_before_the_line():
    """torch's hook of a process group takes what another hook writes to sys.stderr."""
    body = """
import io
earlier = sys.excepthook
def hook(*args):
    kept, sys.stderr = sys.stderr, io.StringIO()
    earlier(*args)
    said, sys.stderr = sys.stderr.getvalue(), kept
    sys.stderr.write(f"[rank0]: {said}" if said else "")
sys.excepthook = hook
from loop.distributed.exit import OutputLost
raise OutputLost("full")
"""
    done = run(body)
    assert (done.returncode, done.stderr) == (1, "said\nerror: standard output: full\n")
