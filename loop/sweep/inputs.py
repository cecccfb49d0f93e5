"""Checks the bases and the data of all runs of a sweep before the first of them starts.

Else a base that is missing would be said hours later, when its run is at turn.
"""

import subprocess
import sys
from collections.abc import Callable

from ..config.schema import Config, ConfigError
from .grid import Run
from .results import read_result

# What a base and its data are judged by. Runs that have these in common are checked once.
INPUTS = {
    "base",
    "revision",
    "method",
    "lora",
    "adapter",
    "max_seq_len",
    "data",
    "task",
    "deepspeed",
}


def inputs_of(config: Config) -> str:
    """The settings that base and data are checked under, as a text to compare."""
    return config.model_dump_json(include=INPUTS)


def check_inputs(runs: list[Run], say: Callable[[str], None]) -> None:
    """Raises ConfigError naming the first run whose base or data can't be used.

    Each is asked by `plan`, in a process of its own, so that its memory is given back. The tokens
    that it makes are in the cache then. Where it fails for another reason, the run will say that.

    say: takes a line for whoever waits.
    """
    seen: set[str] = set()
    for run in runs:
        inputs = inputs_of(run.config)
        if inputs in seen or read_result(run).finished:
            continue
        seen.add(inputs)
        say(f"checking the base and the data of run {run.config.run.name}")
        words = [word for word in run.args if not word.startswith(("--gpus=", "--hostfile="))]
        command = [sys.executable, "-m", "loop.commands.plan", *words]
        asked = subprocess.run(command, capture_output=True, text=True)
        errors = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
        if asked.returncode == 2 and errors:
            raise ConfigError(f"run {run.config.run.name}: {errors[-1].removeprefix('error: ')}")
