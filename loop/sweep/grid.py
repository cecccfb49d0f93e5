"""From `lr=1e-4,3e-4 lora.r=16,64` to runs: every combination of the values, each a configuration.

A value is split at its commas as a YAML list is, so those inside [brackets], {braces} and "quotes"
stay.
"""

import itertools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from ..config.cli import load_config, take_options
from ..config.schema import Config, ConfigError
from ..distributed.hosts import find_hosts

MAX_NAME = 150  # characters of a run's name
MOST_RUNS = 1000


class Run(NamedTuple):
    """One run of a sweep."""

    values: dict[str, str]  # of the swept keys, as they were typed
    args: list[str]  # of train
    config: Config


class Sweep(NamedTuple):
    folder: Path  # of all its runs
    runs: list[Run]
    takes_gpus: bool  # the command line says what ranks a run has


def split_values(value: str) -> list[str]:
    """The values of `key=a,b,c` as they were typed; one where it is a single YAML value."""
    try:
        node = yaml.compose(f"[{value}]")
    except (yaml.YAMLError, RecursionError):
        return [value]  # load_config says what is wrong with it
    if len(node.value) < 2:
        return [value]
    return [value[n.start_mark.index - 1 : n.end_mark.index - 1].strip() for n in node.value]


def read_axes(args: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({key: its values} of the keys with several, the other words).

    Raises ConfigError where there is nothing to sweep, a value twice, or a key that can't be swept.
    """
    axes: dict[str, list[str]] = {}
    others = []
    for arg in args:
        key, _, value = arg.partition("=")
        values = split_values(value)
        if len(values) < 2:
            others.append(arg)
            continue
        if key in axes or len({*values}) < len(values):
            raise ConfigError(f"{arg}: a key or one of its values is there twice")
        if key.startswith(("run.", "monitor.")):
            raise ConfigError(f"{arg}: runs that differ in {key} can't be compared; give one value")
        axes[key] = values
    for arg in others:
        key = arg.partition("=")[0]
        if key in axes:
            raise ConfigError(f"{arg}: {key} is swept already; give its values in one word")
    if math.prod(map(len, axes.values())) > MOST_RUNS:
        raise ConfigError(f"{', '.join(axes)}: more than {MOST_RUNS:,} combinations; give fewer")
    if not axes:
        words = [" ".join(arg.split()) for arg in others if "=" in arg[:40]]
        single = f" ({', '.join(words)[:200]}: one value each)" if words else ""
        raise ConfigError(
            f"nothing to sweep{single}: give a key several values, as in lr=1e-4,3e-4"
        )
    return axes, others


def run_name(values: dict[str, str]) -> str:
    """The folder of a run: its values as they were typed, without what a path can't hold."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    return re.sub(r"[^\w.,=+-]+", "-", name)


def plan_sweep(argv: list[str]) -> Sweep:
    """The runs of `[--config FILE] key=a,b,... [key=value ...]`, each configuration checked.

    They lie in run.dir/run.name; without a run.name on the command line, in that of the file with
    `-sweep` behind it. Raises ConfigError.
    """
    args = list(argv)
    options = take_options(args, {"--gpus": None, "--hostfile": None})
    ranks = [f"{name}={value}" for name, value in options.items() if value]  # of each run
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    find_hosts(options["--gpus"], options["--hostfile"], None, visible)  # or each run would fail
    axes, others = read_axes(args)
    first = load_config([*others, *(f"{key}={values[0]}" for key, values in axes.items())])
    named = any(arg.startswith("run.name=") for arg in others)
    folder = first.folder if named else first.folder.with_name(f"{first.run.name}-sweep")
    if (folder / "config.yaml").exists():
        raise ConfigError(f"run.name={folder.name}: is a run's own folder; give another name")
    if not first.data.valid and not first.data.valid_fraction:
        raise ConfigError("data.valid: a sweep needs validation examples to compare its runs by")
    runs: list[Run] = []
    names: dict[str, str] = {}  # of the runs, by what they compute
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination))
        name = run_name(values)
        if len(name) > MAX_NAME or name in {run.config.run.name for run in runs}:
            name = f"run-{len(runs) + 1}"
        words = [*others, *(f"{key}={value}" for key, value in values.items())]
        words += [f"run.dir={folder}", f"run.name={name}"]
        config = load_config(words)
        same = names.setdefault(config.model_dump_json(exclude={"run"}), name)
        if same != name:  # as with lr=1e-4,0.0001
            raise ConfigError(f"{name}: is the same run as {same}; leave one out")
        runs.append(Run(values, [*ranks, *words], config))
    return Sweep(folder, runs, bool(ranks))
