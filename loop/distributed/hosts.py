"""Starts a command's ranks for ./launch.sh, here or on the machines of a hostfile, and sees them to a good end.

On each machine DeepSpeed's launcher (`deepspeed.launcher.launch`) starts the ranks. It would pass a SIGTERM on to one rank after the other and kill
what is left after 30 seconds, so a stop goes past it: every rank gets one SIGTERM, at once, and its own time to save.

On other machines ssh starts ./launch.sh, with `--node-rank`. Its standard input is the line to it: first the hosts, then a sign of life now and
then, "stop" or "kill"; when it closes or falls silent, because the one who started all is gone, that is a stop as well. DeepSpeed's own way there,
pdsh, cuts the connections at a signal: what the ranks say of their end is lost, it ends before they have saved, and killed it leaves them training.
"""

import json
import os
import shutil
from pathlib import Path

from ..config.schema import ConfigError

Hosts = dict[str, list[int]]  # the numbers of each machine's GPUs, or of its CPU ranks


def read_hostfile(path: Path, gpus: int | None = None) -> Hosts:
    """Lines of `NAME slots=N`, as DeepSpeed has them. gpus: of each machine, if not all its slots. Raises ConfigError with file and line."""
    hosts: Hosts = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hostfile '{path}': {getattr(error, 'strerror', None) or 'not a text'}"
        ) from error
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdecimal() or not int(slots) or words[0] in hosts or words[1] == slots:
            raise ConfigError(
                f"--hostfile {path}, line {number}: not `NAME slots=N` with N from 1 upwards and each name once: {line.strip()[:60]}"
            )
        if gpus and gpus > int(slots):
            raise ConfigError(
                f"--gpus {gpus} is more than the slots of {words[0]} ({path}, line {number})"
            )
        hosts[words[0]] = list(range(gpus or int(slots)))
    if not hosts:
        raise ConfigError(f"--hostfile {path}: names no machine; a line is `NAME slots=N`")
    return hosts


def local_hosts(visible: str, gpus: int | None = None) -> Hosts:
    """visible: the numbers of the GPUs that may be used, "0,1". Without any there are ranks on the CPU, two if `gpus` does not say how many."""
    if not visible:
        return {"localhost": list(range(gpus or 2))}
    if set(visible) - set("0123456789,"):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES must hold numbers such as 0,1, not '{visible}'")
    numbers = [int(number) for number in visible.split(",") if number]
    if (gpus or 1) > len(numbers):
        raise ConfigError(f"--gpus {gpus} is more than the {len(numbers)} that are here: {visible}")
    return {"localhost": numbers[:gpus]}


def find_hosts(
    gpus: str | None, hostfile: str | None, node: str | None, visible: str, line=None
) -> Hosts:
    """The run's machines by the options as they were typed. visible: as in `this_machine`; line: from which hosts "-" are read."""
    if gpus is not None and not (gpus.isdecimal() and int(gpus)):
        raise ConfigError(f"--gpus takes a number from 1 upwards, not '{gpus}'")
    count = int(gpus) if gpus else None
    if hostfile is not None and node is None and not shutil.which("ssh"):
        raise ConfigError(
            "--hostfile: there is no ssh here; start each machine by hand with --node-rank"
        )
    if line:
        try:
            hosts = json.loads(line.readline())
        except ValueError as error:
            raise ConfigError(
                "--hostfile -: is how ./launch.sh starts other machines; name a file"
            ) from error
    else:
        hosts = (
            local_hosts(visible, count)
            if hostfile is None
            else read_hostfile(Path(hostfile), count)
        )
    if node is not None:
        if hostfile is None or not node.isdecimal() or int(node) >= len(hosts):
            raise ConfigError(
                f"--node-rank '{node}': takes this machine's place in the --hostfile, from 0 upwards ({len(hosts)} machines)"
            )
        here = list(hosts)[int(node)]
        hosts[here] = local_hosts(visible, len(hosts[here]))[
            "localhost"
        ]  # which ones those of other machines are, they know
    return hosts


def number_of(name: str, default: int) -> int:
    """The environment's number of this name."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text}: must be a whole number")
    return int(text)
