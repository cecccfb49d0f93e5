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
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from ..config.cli import take_options
from ..config.schema import ROOT, ConfigError
from .exit import exit_process, exit_with_config_error
from .hosts import Hosts, find_hosts, number_of

PASSED_ON = (
    "GLOO_",
    "HF_H",
    "LOOP_",
    "MASTER_",
    "NCCL_",
    "OMP_",
)  # how the names begin of what other machines get of the environment
SILENCE = 60  # seconds; a sign of life comes every five
LAST_WORDS = 75  # seconds that the others have, after ranks ended badly, to say what they miss: run.heartbeat_timeout_minutes is one minute


class LocalNode:
    """This machine's ranks, children of DeepSpeed's launcher."""

    def __init__(
        self, hosts: Hosts, node: int, address: str, port: int, command: list[str]
    ) -> None:
        world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
        threads = max(1, len(os.sched_getaffinity(0)) // len(list(hosts.values())[node]))
        env = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "LOOP_LAUNCHER_PID": str(os.getpid()),
        }  # the ranks end when it is gone
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
            for process in launcher.children() or [
                launcher
            ]:  # with no ranks yet, it is the launcher that shall end
                process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def still_here(self) -> None:
        """They watch this process by its number."""


class RemoteNode:
    """Another machine's ./launch.sh, at the other end of an ssh connection."""

    def __init__(self, host: str, hosts: Hosts, node: int, port: int, command: list[str]) -> None:
        env = [
            f"{name}={value}" for name, value in os.environ.items() if name.startswith(PASSED_ON)
        ]
        started = [
            "env",
            *env,
            f"MASTER_PORT={port}",
            str(ROOT / "launch.sh"),
            *command,
            "--hostfile=-",
            f"--node-rank={node}",
        ]
        self.process = subprocess.Popen(
            [
                "ssh",
                "-o",
                "BatchMode=yes",
                "-o",
                "ServerAliveInterval=5",
                host,
                f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(started)}",
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
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


class StopSignals:
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
        self.kill = self.kill or (
            self.stop and time.monotonic() > self.since + 1
        )  # one request may come twice at once
        if not self.stop:
            self.stop, self.since = True, time.monotonic()

    def _listen(self, line: io.FileIO) -> None:
        while select.select([line], [], [], SILENCE)[0] and (word := line.readline()):
            if word != b"alive\n":
                self.stop, self.kill = True, word == b"kill\n"
        self.stop = True


def supervise(parts: Sequence[LocalNode | RemoteNode], requests: StopSignals, grace: float) -> int:
    """Waits for the ranks of all `parts` and stops them when that is asked for. Returns the exit code of the first that ended badly, or 0."""
    deadline, stopping, code = math.inf, False, 0
    while running := [part for part in parts if part.process.poll() is None]:
        bad = [part for part in parts if part.process.returncode]
        lost = (
            bool(bad) and bad[0].process.returncode == 255
        )  # ssh's own: its ranks may live, and have been told so by their end of the line
        if (requests.stop or lost) and not stopping:
            stopping, deadline = True, min(deadline, time.monotonic() + grace)
            for part in running:
                part.stop()
            if not requests.line and not lost:
                say("stopping, the ranks save first (once more: stop at once)")
        if bad and not code:
            code = bad[0].process.returncode
            deadline = min(deadline, time.monotonic() + (grace if lost else LAST_WORDS))
            say(
                f"{bad[0].name} ended with {code}{' (ssh: the connection); the others stop' * lost}"
            )
        if requests.kill or time.monotonic() >= deadline:
            for part in running:
                part.kill()
        for part in running:
            part.still_here()
        time.sleep(0.1)
    for part in parts:
        part.kill()  # whatever is left behind
    return code or next((part.process.returncode for part in parts if part.process.returncode), 0)


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
            line = open(
                0, "rb", buffering=0, closefd=False
            )  # without a buffer: a thread that waits at its lock could not be left behind
        hosts = find_hosts(
            options["--gpus"], hostfile, node, os.environ.get("CUDA_VISIBLE_DEVICES", ""), line
        )
    except ConfigError as error:
        exit_with_config_error(error)
    with socket.socket() as s:  # a port that is free, so two runs can coexist
        s.bind(("", 0))
        port = port or (29500 if node else s.getsockname()[1])
    requests = StopSignals(line)
    if (
        hostfile and not node
    ):  # the port was free here; where it is not on the first machine, MASTER_PORT names another
        code = supervise(
            [RemoteNode(host, hosts, k, port, [name, *args]) for k, host in enumerate(hosts)],
            requests,
            grace + 5,
        )
    else:
        address = (
            (os.environ.get("MASTER_ADDR") or next(iter(hosts)).split("@")[-1])
            if hostfile
            else "127.0.0.1"
        )
        code = supervise(
            [LocalNode(hosts, int(node or 0), address, port, [f"loop.commands.{name}", *args])],
            requests,
            grace,
        )
        if (
            code < 0 or code > 192
        ):  # a rank that died by signal N: DeepSpeed's launcher says 256 - N, a shell says 128 + N
            code = 128 - code if code < 0 else 384 - code
            if not requests.stop:
                say(f"signal {code - 128} ended a rank (9 often means: out of memory)")
    exit_process(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
