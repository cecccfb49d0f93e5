"""A run's folder: made, locked against a second run, and its files whole whenever the process is killed."""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from ..config.schema import ROOT, Config, ConfigError
from ..distributed.files import write_atomically
from ..distributed.world import Ranks, on_gpu

LOCK = ".lock"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets")


def open_run_dir(config: Config, ranks: Ranks) -> contextlib.AbstractContextManager:
    """Makes the run's folder and takes its lock, which is returned, to be held as long as the run writes. With run.resume=false an earlier
    run of this name is moved aside, not overwritten. Every rank must call it; ConfigError on all of them when it can't be done."""
    folder, lock, problem = config.folder, contextlib.nullcontext(), None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            if not config.run.resume and any(p.name != LOCK for p in folder.iterdir()):
                aside = next(
                    p
                    for n in itertools.count(1)
                    if not (p := folder.with_name(f"{folder.name}.{n}")).exists()
                )
                print(f"{folder} is {folder.rename(aside)} now")
                folder.mkdir()
                lock = lock_folder(folder)
        except TimeoutError:
            problem = f"run.name={config.run.name}: another run writes to {folder}; wait for its end, or give this one another name"
        except OSError as error:
            problem = f"run.dir, run.name: {folder} cannot be made ({error.strerror})"
    if problem := ranks.all_gather_json(problem)[0]:
        raise ConfigError(problem)
    return lock


def lock_folder(folder: Path):
    """Locks a run's folder and returns the open file that holds the lock; it ends with the process, however that ends. The ranks of a run
    whose launcher was killed save before they go, so an earlier run gets that time. Raises TimeoutError when it is still there then."""
    file, end, said = (
        (folder / LOCK).open("w"),
        time.monotonic() + float(os.environ.get("LOOP_GRACE_SECONDS") or 120),
        False,
    )
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError from None
            if not said:
                print(f"waiting for the earlier run in {folder} to end", flush=True)
            said = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


def versions() -> dict[str, str]:
    """Library versions, Python, GPU and the repository's commit, for the run's folder and for bug reports."""
    found = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    found["device"] = torch.cuda.get_device_name() if on_gpu() else f"cpu ({os.cpu_count()} cores)"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return found | {"commit": git.stdout.strip() or "unknown"}


def lines_to_keep(log: str, first_step: int, evaluated: bool) -> list[dict]:
    """What a run that goes on after `first_step` keeps of its metrics.jsonl, so that it shows one curve: nothing of the steps that it will
    run again, nothing of an evaluation that it will repeat, and not the half line at which the earlier run was killed."""
    whole = (
        [json.loads(line) for line in log.splitlines() if line.endswith("}")] if first_step else []
    )
    return [
        line
        for line in whole
        if line["step"] < first_step
        or (line["step"] == first_step and (evaluated or "eval/loss" not in line))
    ]


def as_markdown(texts: dict[str, str]) -> str:
    return "\n\n".join(f"## {key}\n\n{text}" for key, text in texts.items()) + "\n"


def write_report(folder: Path, figures: dict) -> dict:
    """Adds figures to the run's report.json and returns all of them."""
    path = folder / "report.json"
    figures = (json.loads(path.read_text()) if path.exists() else {}) | figures
    write_atomically(path, json.dumps(figures, indent=2) + "\n")
    return figures
