"""Starts a command's ranks for ./launch.sh, here or on the machines of a hostfile, and sees them to a good end.

On each machine DeepSpeed's launcher (`deepspeed.launcher.launch`) starts the ranks. It would pass a SIGTERM on to one rank after the other and kill
what is left after 30 seconds, so a stop goes past it: every rank gets one SIGTERM, at once, and its own time to save.

On other machines ssh starts ./launch.sh, with `--node-rank`. Its standard input is the line to it: first the hosts, then a sign of life now and
then, "stop" or "kill"; when it closes or falls silent, because the one who started all is gone, that is a stop as well. DeepSpeed's own way there,
pdsh, cuts the connections at a signal: what the ranks say of their end is lost, it ends before they have saved, and killed it leaves them training.
"""

import base64
import contextlib
import io
import json
import math
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from .cli import exit_with_config_error, leave, take_options
from .config import ROOT, ConfigError

PASSED_ON = ("GLOO_", "HF_H", "LOOP_", "MASTER_", "NCCL_", "OMP_")  # how the names begin of what other machines get of the environment
SILENCE = 60  # seconds; a sign of life comes every five
LAST_WORDS = 75  # seconds that the others have, after ranks ended badly, to say what they miss: run.silence_minutes is one minute

Hosts = dict[str, list[int]]  # the numbers of each machine's GPUs, or of its CPU ranks


def read_hostfile(path: Path, gpus: int | None = None) -> Hosts:
    """Lines of `NAME slots=N`, as DeepSpeed has them. gpus: of each machine, if not all its slots. Raises ConfigError with file and line."""
    hosts: Hosts = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile '{path}': {getattr(error, 'strerror', None) or 'not a text'}") from error
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdecimal() or not int(slots) or words[0] in hosts or words[1] == slots:
            raise ConfigError(f"--hostfile {path}, line {number}: not `NAME slots=N` with N from 1 upwards and each name once: {line.strip()[:60]}")
        if gpus and gpus > int(slots):
            raise ConfigError(f"--gpus {gpus} is more than the slots of {words[0]} ({path}, line {number})")
        hosts[words[0]] = list(range(gpus or int(slots)))
    if not hosts:
        raise ConfigError(f"--hostfile {path}: names no machine; a line is `NAME slots=N`")
    return hosts


def this_machine(visible: str, gpus: int | None = None) -> Hosts:
    """visible: the numbers of the GPUs that may be used, "0,1". Without any there are ranks on the CPU, two if `gpus` does not say how many."""
    if not visible:
        return {"localhost": list(range(gpus or 2))}
    if set(visible) - set("0123456789,"):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES must hold numbers such as 0,1, not '{visible}'")
    numbers = [int(number) for number in visible.split(",") if number]
    if (gpus or 1) > len(numbers):
        raise ConfigError(f"--gpus {gpus} is more than the {len(numbers)} that are here: {visible}")
    return {"localhost": numbers[:gpus]}


def machines(gpus: str | None, hostfile: str | None, node: str | None, visible: str, line=None) -> Hosts:
    """The run's machines by the options as they were typed. visible: as in `this_machine`; line: from which hosts "-" are read."""
    if gpus is not None and not (gpus.isdecimal() and int(gpus)):
        raise ConfigError(f"--gpus takes a number from 1 upwards, not '{gpus}'")
    count = int(gpus) if gpus else None
    if hostfile is not None and node is None and not shutil.which("ssh"):
        raise ConfigError("--hostfile: there is no ssh here; start each machine by hand with --node-rank")
    if line:
        try:
            hosts = json.loads(line.readline())
        except ValueError as error:
            raise ConfigError("--hostfile -: is how ./launch.sh starts other machines; name a file") from error
    else:
        hosts = this_machine(visible, count) if hostfile is None else read_hostfile(Path(hostfile), count)
    if node is not None:
        if hostfile is None or not node.isdecimal() or int(node) >= len(hosts):
            raise ConfigError(f"--node-rank '{node}': takes this machine's place in the --hostfile, from 0 upwards ({len(hosts)} machines)")
        here = list(hosts)[int(node)]
        hosts[here] = this_machine(visible, len(hosts[here]))["localhost"]  # which ones those of other machines are, they know
    return hosts


class ThisMachine:
    """This machine's ranks, children of DeepSpeed's launcher."""

    def __init__(self, hosts: Hosts, node: int, address: str, port: int, command: list[str]) -> None:
        world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
        threads = max(1, len(os.sched_getaffinity(0)) // len(list(hosts.values())[node]))
        env = {"OMP_NUM_THREADS": str(threads), **os.environ, "LOOP_LAUNCHER_PID": str(os.getpid())}  # the ranks end when it is gone
        env.pop("CUDA_VISIBLE_DEVICES", None)  # DeepSpeed sets it for the ranks
        self.name = "this machine"
        # SLURM sends a job's signal to each of its processes, and this one would end DeepSpeed's launcher. What is ignored stays so in a child.
        handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={node}", f"--master_addr={address}",
             f"--master_port={port}", "--log_level=critical", "--no_local_rank", "--module", *command],
            env=env, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip # the terminal's Ctrl-C is for this process alone
        signal.signal(signal.SIGUSR1, handler)

    def stop(self) -> None:
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self.process.pid)
            for process in launcher.children() or [launcher]:  # with no ranks yet, it is the launcher that shall end
                process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def still_here(self) -> None:
        """They watch this process by its number."""


class Machine:
    """Another machine's ./launch.sh, at the other end of an ssh connection."""

    def __init__(self, host: str, hosts: Hosts, node: int, port: int, command: list[str]) -> None:
        env = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(PASSED_ON)]
        started = ["env", *env, f"MASTER_PORT={port}", str(ROOT / "launch.sh"), *command, "--hostfile=-", f"--node-rank={node}"]
        self.process = subprocess.Popen(
            ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", host, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(started)}"],
            stdin=subprocess.PIPE, start_new_session=True)  # fmt: skip
        self.name, self.given_up = host, 0.0
        self.tell(json.dumps(hosts))

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.told = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        self.tell("stop")

    def still_here(self) -> None:
        if time.monotonic() > self.told + 5:
            self.tell("alive")

    def kill(self) -> None:
        self.tell("kill")
        self.given_up = self.given_up or time.monotonic() + 5
        if time.monotonic() > self.given_up:  # nobody answers there
            self.process.kill()


class Requests:
    """What a signal, or the one who started this, wants: at first a stop, then an end at once."""

    def __init__(self, line: io.FileIO | None) -> None:
        self.stop = self.kill = False
        self.line = line
        self.since = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a script's `&`
                signal.signal(number, self._on_signal)
        if line:
            threading.Thread(target=self._listen, args=(line,), daemon=True).start()

    def _on_signal(self, number, frame) -> None:
        self.kill = self.kill or (self.stop and time.monotonic() > self.since + 1)  # one request may come twice at once
        if not self.stop:
            self.stop, self.since = True, time.monotonic()

    def _listen(self, line: io.FileIO) -> None:
        while select.select([line], [], [], SILENCE)[0] and (word := line.readline()):
            if word != b"alive\n":
                self.stop, self.kill = True, word == b"kill\n"
        self.stop = True


def see_to_the_end(parts: Sequence[ThisMachine | Machine], requests: Requests, grace: float) -> int:
    """Waits for the ranks of all `parts` and stops them when that is asked for. Returns the exit code of the first that ended badly, or 0."""
    deadline, stopping, code = math.inf, False, 0
    while running := [part for part in parts if part.process.poll() is None]:
        bad = [part for part in parts if part.process.returncode]
        lost = bool(bad) and bad[0].process.returncode == 255  # ssh's own: its ranks may live, and have been told so by their end of the line
        if (requests.stop or lost) and not stopping:
            stopping, deadline = True, min(deadline, time.monotonic() + grace)
            for part in running:
                part.stop()
            if not requests.line and not lost:
                say("stopping, the ranks save first (once more: stop at once)")
        if bad and not code:
            code = bad[0].process.returncode
            deadline = min(deadline, time.monotonic() + (grace if lost else LAST_WORDS))
            say(f"{bad[0].name} ended with {code}{' (ssh: the connection); the others stop' * lost}")
        if requests.kill or time.monotonic() >= deadline:
            for part in running:
                part.kill()
        for part in running:
            part.still_here()
        time.sleep(0.1)
    for part in parts:
        part.kill()  # whatever is left behind
    return code or next((part.process.returncode for part in parts if part.process.returncode), 0)


def number_of(name: str, default: int) -> int:
    """The environment's number of this name."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text}: must be a whole number")
    return int(text)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody need read it
        print(f"launch.sh: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """`python -m loop.launcher COMMAND [--gpus N] [--hostfile FILE [--node-rank K]] [what COMMAND takes]`."""
    name, *args = sys.argv[1:] if argv is None else argv
    line = None
    try:
        grace, port = number_of("LOOP_GRACE_SECONDS", 120), number_of("MASTER_PORT", 0)
        options = take_options(args, {"--gpus": None, "--hostfile": None, "--node-rank": None})
        hostfile, node = options["--hostfile"], options["--node-rank"]
        if hostfile == "-":
            line = open(0, "rb", buffering=0, closefd=False)  # without a buffer: a thread that waits at its lock could not be left behind
        hosts = machines(options["--gpus"], hostfile, node, os.environ.get("CUDA_VISIBLE_DEVICES", ""), line)
    except ConfigError as error:
        exit_with_config_error(error)
    with socket.socket() as s:  # a port that is free, so two runs can coexist
        s.bind(("", 0))
        port = port or (29500 if node else s.getsockname()[1])
    requests = Requests(line)
    if hostfile and not node:  # the port was free here; where it is not on the first machine, MASTER_PORT names another
        code = see_to_the_end([Machine(host, hosts, k, port, [name, *args]) for k, host in enumerate(hosts)], requests, grace + 5)
    else:
        address = (os.environ.get("MASTER_ADDR") or next(iter(hosts)).split("@")[-1]) if hostfile else "127.0.0.1"
        code = see_to_the_end([ThisMachine(hosts, int(node or 0), address, port, [f"loop.{name}", *args])], requests, grace)
        if code < 0 or code > 192:  # a rank that died by signal N: DeepSpeed's launcher says 256 - N, a shell says 128 + N
            code = 128 - code if code < 0 else 384 - code
            if not requests.stop:
                say(f"signal {code - 128} ended a rank (9 often means: out of memory)")
    leave(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
