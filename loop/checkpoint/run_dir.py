"""A run's directory, runs/NAME: made, locked against a second run; its report and its log.

The lock is an flock, so it ends with the process that holds it, however that ends.
"""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch

from ..config.schema import ROOT, Config, ConfigError
from ..distributed.files import write_atomically
from ..distributed.world import Ranks, on_gpu

LOCK = ".lock"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets")


@contextlib.contextmanager
def open_run_dir(config: Config, ranks: Ranks) -> Iterator[Path]:
    """A context with the run's directory, locked by rank 0 as long as the context is entered.

    With run.resume=false an earlier run of this name is moved aside, not overwritten. Every rank
    must call it; raises ConfigError on all of them when another run holds the lock, or when the
    directory cannot be made.
    """
    run_dir = config.folder
    with contextlib.ExitStack() as stack:
        problem = None
        if ranks.is_main:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(lock_folder(run_dir))
                if not config.run.resume and any(p.name != LOCK for p in run_dir.iterdir()):
                    print(f"{run_dir} is {_move_aside(run_dir)} now")
                    run_dir.mkdir()
                    stack.enter_context(lock_folder(run_dir))
                    lock.close()  # it lies in what was moved
            except TimeoutError:
                problem = (
                    f"run.name={config.run.name}: another run writes to {run_dir}; wait for its "
                    "end, or give this one another name"
                )
            except OSError as error:
                problem = f"run.dir, run.name: {run_dir} cannot be made ({error.strerror})"
        problem = ranks.all_gather_json(problem)[0]
        if problem:
            raise ConfigError(problem)
        yield run_dir


def _move_aside(run_dir: Path) -> Path:
    """Renames runs/NAME to the first free one of runs/NAME.1, runs/NAME.2, ...; returns it."""
    paths = (run_dir.with_name(f"{run_dir.name}.{n}") for n in itertools.count(1))
    return run_dir.rename(next(path for path in paths if not path.exists()))


def lock_folder(folder: Path) -> TextIO:
    """Locks a run directory and returns the open file that holds the lock until it is closed.

    An earlier run gets LOOP_GRACE_SECONDS (120) to end: the ranks of a run whose launcher was
    killed save before they go. Raises TimeoutError when it is still there then.
    """
    file = _open_lock(folder)
    end = time.monotonic() + float(os.environ.get("LOOP_GRACE_SECONDS") or 120)
    announced = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, folder / LOCK):
                return file
            # The folder was moved aside meanwhile: what is locked is another run's now.
            file.close()
            file = _open_lock(folder)
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError from None
            if not announced:
                print(f"waiting for the earlier run in {folder} to end", flush=True)
                announced = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


def _open_lock(folder: Path) -> TextIO:
    """The lock file, made with its folder if need be; a link is not followed (OSError)."""
    folder.mkdir(parents=True, exist_ok=True)
    return open(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+")


def _is_at(file: TextIO, path: Path) -> bool:
    """True where the path leads to this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False


def collect_versions() -> dict[str, str]:
    """Versions of libraries and Python, the GPU, and the repository's commit; for bug reports."""
    found = {name: version(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    found["device"] = torch.cuda.get_device_name() if on_gpu() else f"cpu ({os.cpu_count()} cores)"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    found["commit"] = git.stdout.strip() or "unknown"
    return found


def whole_lines(log: str) -> list[dict]:
    """The lines of metrics.jsonl that are whole, so of numbers: a crash may have torn some."""
    lines = []
    for text in log.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                if all(isinstance(value, (int, float)) for value in line.values()):
                    lines.append(line)
    return lines


def lines_to_keep(log: str, first_step: int, evaluated: bool) -> list[dict]:
    """The lines of metrics.jsonl that a run resumed after `first_step` keeps, for one curve.

    It drops the steps that will be run again, the evaluation of `first_step` if that will be
    repeated (evaluated=False), and the half line at which the earlier run was killed.
    """
    if not first_step:
        return []
    return [
        line
        for line in whole_lines(log)
        if line["step"] < first_step
        or (line["step"] == first_step and (evaluated or "eval/loss" not in line))
    ]


def as_markdown(texts: dict[str, str]) -> str:
    """Texts as the sections of one Markdown document, each under its key."""
    return "\n\n".join(f"## {key}\n\n{text}" for key, text in texts.items()) + "\n"


def read_report(folder: Path) -> dict:
    """What report.json holds; {} where it is absent or torn."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        report = json.loads((folder / "report.json").read_text())
        if isinstance(report, dict):
            return report
    return {}


def write_report(folder: Path, metrics: dict) -> dict:
    """Adds metrics to the run's report.json and returns all that it holds then."""
    path = folder / "report.json"
    report = read_report(folder) | metrics
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    return report
