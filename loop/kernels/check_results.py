"""What was found about kernels before, for the runs that follow.

The results of `./launch.sh check`, which kernels are right and how fast, are one JSON file in the
user's cache folder, which the owner alone can read. A self-test that a run has passed is a file
with the test's name in it; nothing is read from these files but whether a test was passed. All hold
as long as everything that they were made with is the same: machine, GPUs, driver, versions, and the
sources of the checks and the kernels. Without a file a run starts all the same.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..config.device import user_cache
from ..config.schema import ROOT
from ..config.source import source_digest

# Their versions decide which file is read.
PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "bitsandbytes",
    "flash_attn",
    "flash_attn_4",
)
DRIVER = Path("/proc/driver/nvidia/version")

outcomes: dict[str, str] = {}  # self-tests of this process: "passed now", "passed earlier"


def machine_digest() -> str:
    """64 hex digits of this machine, its driver, these versions and these sources."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    # Not the number of GPUs: a run may use fewer than the check.
    gpus = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    key = [
        platform.node(),
        platform.machine(),
        os.cpu_count(),
        gpus,
        DRIVER.read_text() if DRIVER.is_file() else "",
        torch.version.cuda,
        sorted(versions.items()),
    ]
    digest = hashlib.sha256(json.dumps(key).encode())
    digest.update(source_digest("kernels_check", "loop/kernels").encode())
    digest.update((ROOT / "ds_config.json").read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    return user_cache() / "soap-loop"


def results_path() -> Path:
    """The file of this machine and these versions, whether it exists or not."""
    return cache_folder() / f"verdicts-{machine_digest()[:16]}.json"


# ---- self-tests of a run


def run_once(test: str, device, find_problem: Callable[[], str | None]) -> str | None:
    """What is wrong by a self-test, None where it is passed, now or at an earlier start.

    On a GPU a test takes seconds, as it compiles. So one that was passed is not run again while
    everything stays the same; LOOP_KERNEL_TESTS=always runs all of them. A failure is not kept.

    Args:
        test: its name, with all that it depends on beside machine, versions and sources.
        find_problem: the test itself.
    """
    on_gpu = torch.device(device).type == "cuda"
    path = passed_path(test) if on_gpu else None
    always = os.environ.get("LOOP_KERNEL_TESTS") == "always"
    if path and not always and was_passed(path, test):
        outcomes[test] = "passed earlier"
        return None
    problem = find_problem()
    if problem is None:
        outcomes[test] = "passed now"
        if path:
            with contextlib.suppress(OSError):  # the next start tests again
                write_privately(path, test)
    return problem


def passed_path(test: str) -> Path:
    """The file that says that a test was passed here, whether it exists or not."""
    digest = hashlib.sha256(f"{machine_digest()} {test}".encode()).hexdigest()
    return cache_folder() / f"passed-{digest[:32]}.txt"


def was_passed(path: Path, test: str) -> bool:
    """Whether the file is the user's own, which others can't write, and names this test."""
    try:
        with path.open(encoding="utf-8") as file:
            about = os.fstat(file.fileno())
            own = about.st_uid == os.getuid() and not about.st_mode & 0o022
            return own and file.read(len(test) + 1) == test
    except (OSError, ValueError):
        return False


def write_privately(path: Path, text: str) -> None:
    """Writes a file atomically that the owner alone can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


# ---- the check


def save(rows: Iterable[dict]) -> Path:
    """Writes the check's rows (`kernels_check.rows.Row` as dicts) atomically; returns the file."""
    path = results_path()
    write_privately(path, json.dumps({row["what"]: row for row in rows}, indent=1))
    return path


@functools.cache
def load() -> dict[str, dict]:
    """The rows of the last check by their names; {} where there is none or it can't be read."""
    try:
        return json.loads(results_path().read_text())
    except (OSError, ValueError):
        return {}


def measured_speed(what: str) -> float | None:
    """The speed of a row of the check; None where it was not measured or the result was wrong.

    It is in the row's unit: TFLOP/s of a matrix product, "x" of a kernel beside plain torch.
    """
    row = load().get(what, {})
    return row.get("speed") if row.get("verdict") in ("ok", "slow") else None


def failure_reason(check: str, what: str, *more: str) -> str | None:
    """The first of the rows `what` and `more` that is wrong, in one line; None where none is.

    A row is absent where its check crashed before it. The row of the crash, `check`, stands in.
    """
    rows = load()
    names = (what, *more) if what in rows else (check,)
    for name in names:
        row = rows.get(name, {})
        if row.get("verdict") != "wrong":
            continue
        error = ""
        if row["error"] is not None:
            error = f", error {row['error']:.1e} over the bound {row['bound']:.0e}"
        result = f"{row['what']} ({row['version']}){error}: {row['note']}"
        return f"wrong by ./launch.sh check: {result}"
    return None
