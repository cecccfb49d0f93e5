"""Which machines a run has, and how many ranks each: from --gpus, --hostfile and --node-rank."""

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import BinaryIO

from ..config.cli import printable
from ..config.schema import ConfigError

Hosts = dict[str, list[int]]  # the numbers of each machine's GPUs, or of its CPU ranks
MOST_RANKS = 1024  # of a machine
CPU_RANKS = 2  # without GPUs, if --gpus does not say


def read_hostfile(path: Path, gpus: int | None = None) -> Hosts:
    """The machines of a hostfile: lines of `NAME slots=N`, as DeepSpeed has them.

    gpus: how many of each machine's slots are used, None for all. Raises ConfigError with the
    file's name and line.
    """
    hosts: Hosts = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise ConfigError(f"--hostfile '{path}': {reason}") from error
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name = words[0]
        slots = _slots(words)
        # ssh would take a name that begins with - for an option.
        if slots is None or name in hosts or not re.fullmatch(r"[A-Za-z0-9_[][\w.:%@[\]-]*", name):
            raise ConfigError(
                f"--hostfile {path}, line {number}: not `NAME slots=N` with N from 1 upwards and "
                f"each name once: {printable(line.strip()[:60])}"
            )
        if gpus and gpus > slots:
            raise ConfigError(
                f"--gpus {gpus} is more than the slots of {name} ({path}, line {number})"
            )
        hosts[name] = list(range(gpus or slots))
    if not hosts:
        raise ConfigError(f"--hostfile {path}: names no machine; a line is `NAME slots=N`")
    return hosts


def _slots(words: list[str]) -> int | None:
    """The N of the words NAME slots=N; None where they are something else."""
    if len(words) != 2 or not words[1].startswith("slots="):
        return None
    number = words[1].removeprefix("slots=")
    return int(number) if is_number(number) and int(number) else None


def local_hosts(visible: str, gpus: int | None = None) -> Hosts:
    """This machine alone. visible: the numbers of the GPUs that may be used, e.g. "0,1".

    Without any there are `gpus` ranks on the CPU, by default two. Raises ConfigError.
    """
    if not visible:
        return {"localhost": list(range(gpus or CPU_RANKS))}
    if set(visible) - set("0123456789,"):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES must hold numbers such as 0,1, not '{visible}'")
    numbers = [int(number) for number in visible.split(",") if number]
    if (gpus or 1) > len(numbers):
        raise ConfigError(f"--gpus {gpus} is more than the {len(numbers)} that are here: {visible}")
    return {"localhost": numbers[:gpus]}


def find_hosts(
    gpus: str | None,
    hostfile: str | None,
    node: str | None,
    visible: str,
    commands: BinaryIO | None = None,
) -> Hosts:
    """The run's machines.

    Args:
        gpus: the option --gpus, as it was typed.
        hostfile: the option --hostfile, as it was typed.
        node: the option --node-rank, as it was typed.
        visible: as in `local_hosts`.
        commands: the launcher's standard input, for --hostfile=-; its first line holds the hosts.

    Raises ConfigError.
    """
    if gpus is not None and not (is_number(gpus) and 0 < int(gpus) <= MOST_RANKS):
        raise ConfigError(f"--gpus takes a number from 1 to {MOST_RANKS}, not '{printable(gpus)}'")
    count = int(gpus) if gpus else None
    if hostfile is not None and node is None and not shutil.which("ssh"):
        raise ConfigError(
            "--hostfile: there is no ssh here; start each machine by hand with --node-rank"
        )
    if commands:
        hosts = _read_first_line(commands)
    elif hostfile is None:
        hosts = local_hosts(visible, count)
    else:
        hosts = read_hostfile(Path(hostfile), count)
    if node is not None:
        if hostfile is None or not is_number(node) or int(node) >= len(hosts):
            raise ConfigError(
                f"--node-rank '{node}': takes this machine's place in the --hostfile, from 0 "
                f"upwards ({len(hosts)} machines)"
            )
        # Other machines know themselves which of their GPUs may be used.
        this = list(hosts)[int(node)]
        hosts[this] = local_hosts(visible, len(hosts[this]))["localhost"]
    return hosts


def _read_first_line(commands: BinaryIO) -> Hosts:
    try:
        return json.loads(commands.readline())
    except ValueError as error:
        raise ConfigError(
            "--hostfile -: is how ./launch.sh starts other machines; name a file"
        ) from error


def check_network_names() -> None:
    """Raises ConfigError where MASTER_ADDR or an interface in the environment can't be one.

    NCCL's variable may begin with ^, and its names are prefixes. A machine that is not known yet
    may become so while ranks wait.
    """
    address = os.environ.get("MASTER_ADDR") or "localhost"
    if not re.fullmatch(r"[A-Za-z0-9_[][\w.:%\]-]{0,254}", address, re.ASCII):
        raise ConfigError(
            f"MASTER_ADDR={printable(address[:60])}: is no name or address of a machine; correct "
            "or unset it"
        )
    here = [name for _, name in socket.if_nameindex()]
    names = os.environ.get("GLOO_SOCKET_IFNAME") or ""
    if names and not set(names.split(",")) <= set(here):  # gloo takes each of them
        raise _no_interface("GLOO_SOCKET_IFNAME", here)
    names = os.environ.get("NCCL_SOCKET_IFNAME") or "^"
    prefixes = names.removeprefix("=").split(",")  # NCCL takes the first that is here
    found = [own for own in here for prefix in prefixes if own.startswith(prefix.split(":")[0])]
    if not names.startswith("^") and not found:
        raise _no_interface("NCCL_SOCKET_IFNAME", here)


def _no_interface(variable: str, here: list[str]) -> ConfigError:
    return ConfigError(
        f"{variable}={printable(os.environ[variable][:60])}: there is no such network interface "
        f"here, but {', '.join(here)[:200]}; correct or unset it"
    )


def is_number(text: str) -> bool:
    """True for some digits 0 to 9, and not too many; `isdecimal` takes those of other scripts."""
    return bool(re.fullmatch("[0-9]{1,9}", text))


def read_number(name: str, default: int, most: int = 10**9) -> int:
    """The number in an environment variable. Raises ConfigError where it holds something else."""
    text = os.environ.get(name) or str(default)
    if not is_number(text) or int(text) > most:
        raise ConfigError(f"{name}={printable(text)}: must be a whole number, {most} at most")
    return int(text)
