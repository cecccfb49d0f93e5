"""What the README says can be typed, and what it points at is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
# Small enough for a test; a line of the README is run as it stands, with these at its end.
SHORTER = {"train": ["max_steps=2", "data.limit=8", "monitor.sample_max_new_tokens=8", "run.audit=0"],
           "evaluate": ["data.limit=4", "monitor.sample_max_new_tokens=8"],
           "generate": ["--max-new-tokens", "16"]}  # fmt: skip
ELSEWHERE = {
    "./launch.sh test": "this run",
    "./launch.sh check": "tests/test_kernels_check.py",
    "./launch.sh bench": "tests/test_bench.py",
    "./launch.sh board": "tests/test_dashboard.py",
    "./launch.sh profile": "tests/test_timers.py",
    "./launch.sh audit --config runs/mine/config.yaml": "tests/test_audit.py",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked and new files of the checkout, as a fresh clone would have them."""
    folder = tmp_path_factory.mktemp("clone") / "soap"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_the_commands_run_one_after_the_other(clone):
    assert {"./launch.sh", "./launch.sh test"} <= set(COMMANDS)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"LOOP_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    for line in COMMANDS:
        if line in ELSEWHERE:
            continue
        words = shlex.split(line)
        name = words[1] if len(words) > 1 else "train"
        done = subprocess.run(["bash", *words, *SHORTER.get(name, [])], cwd=clone, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line
    assert (clone / "runs" / "embedded" / "adapter" / "adapter_model.safetensors").is_file()
    assert (clone / "runs" / "mine" / "merged" / "config.json").is_file()


def test_what_the_readme_points_at_is_there():
    paths = set(re.findall(r"`((?:loop|tests|kernels_check)/[\w/.]*)`", README)) | set(re.findall(r"\((?:docs)/[\w/.]+\)", README))
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path.strip("()")).exists(), path
    for name in re.findall(r"`(\w+)` \((loop/\w+\.py)\)", README):
        assert f"def {name[0]}" in (ROOT / name[1]).read_text(), name
    assert "@" not in re.sub(r"\S+@\S+\.\S+", "", README), "a figure was not filled in"
