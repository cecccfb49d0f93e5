"""What `launch.sh` starts, and what it keeps from being started."""

import os
import subprocess
import sys

import pytest
from helpers import CPU, PYTHON, ROOT

ENTRY = str(ROOT / "launch.sh")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 imports from there")
def test_no_module_of_the_folder_where_one_stands_is_imported(tmp_path):
    """A data set's folder may hold a `yaml.py` or a `loop/` of its own."""
    (tmp_path / "loop").mkdir()
    for name in ("yaml.py", "loop/__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger runs')")
    command = ["train", "--gpus", "many"]
    env = os.environ | {"LOOP_PYTHON": sys.executable}
    for start, words in (
        ([sys.executable, "-m", "loop.distributed.launcher"], "a stranger runs"),  # as Python does
        ([ENTRY], "error: --gpus takes a number from 1 to 1024, not 'many'"),
    ):
        done = subprocess.run(
            [*start, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode and done.stderr.strip() == words


def test_deepspeeds_own_launcher_can_start_it(tmp_path):
    """It runs the file with Python and adds --local_rank."""
    command = [PYTHON, ENTRY, "--local_rank=0", "lr=fast"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | CPU, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: lr='fast'")


@pytest.mark.parametrize("value", ["garbage", "0", "-1", "1.5", "4,", "99999"])
def test_a_number_of_threads_that_is_none_is_named(value):
    """libgomp would take all cores; where it says so, it is before the command's own lines."""
    env = os.environ | {"LOOP_PYTHON": PYTHON, "OMP_NUM_THREADS": value}
    done = subprocess.run([ENTRY, "plan"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"launch.sh: OMP_NUM_THREADS={value}: must be a whole number")
