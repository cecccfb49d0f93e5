"""Starts a command's ranks for ./launch.sh, on this machine or on those of a hostfile.

On each machine `start_ranks` starts the ranks. A stop goes past it: every rank gets one SIGTERM,
and its own time to save.

Other machines are reached over ssh, which starts ./launch.sh there with --node-rank. Its standard
input carries commands: a line with the hosts, then "alive" now and then, "stop" or "kill". When it
closes or falls silent, because this process is gone, that is a stop as well. DeepSpeed's own way,
pdsh, cuts the connections at a signal: the last messages of the ranks are lost, it ends before they
have saved, and when it is killed they go on training.
"""

import contextlib
import io
import json
import math
import os
import re
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
from .hosts import Hosts, check_network_names, find_hosts, read_number

# How the names begin of the environment variables that other machines get.
PASSED_ON = ("GLOO_", "HF_H", "LOOP_", "MASTER_", "NCCL_", "OMP_")
# A secret would be in other machines' lists of processes.
SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY")
ALIVE_SECONDS = 5  # between two signs of life
SILENCE_SECONDS = 60  # without a sign of life: a stop
# After ranks ended badly the others have so long to report the loss themselves:
# run.heartbeat_timeout_minutes is one minute.
REPORT_SECONDS = 75
REPEAT_SECONDS = 1  # one request may arrive twice at once
KILL_SECONDS = 5  # for another machine to answer "kill"
SSH_FAILED = 255
DEFAULT_PORT = 29500  # where every machine is started by hand


class LocalNode:
    """The ranks of this machine, children of `start_ranks`."""

    def __init__(
        self, hosts: Hosts, node: int, address: str, port: int, command: list[str]
    ) -> None:
        """Starts the ranks.

        Args:
            hosts: all machines of the run.
            node: which of them this is.
            address: of the first machine, where the ranks find each other.
            port: there.
            command: a Python module and its arguments.
        """
        self.name = "this machine"
        num_ranks = len(list(hosts.values())[node])
        spec = {"hosts": hosts, "node": node, "address": address, "port": port}
        env = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks)),
            **os.environ,
            "LOOP_LAUNCHER_PID": str(os.getpid()),  # the ranks end when it is gone
        }
        # SLURM sends a job's signal to each of its processes. It would end `start_ranks`,
        # but a signal that is ignored here stays so in a child.
        handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "loop.distributed.start_ranks", json.dumps(spec)),
                *command,
            ],
            env=env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for this process alone
        )
        signal.signal(signal.SIGUSR1, handler)

    def stop(self) -> None:
        """Sends every rank one SIGTERM; where there are none yet, their parent."""
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self.process.pid)
            for process in launcher.children() or [launcher]:
                process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def keep_alive(self) -> None:
        """Nothing: the ranks here watch this process by its pid."""


class RemoteNode:
    """Another machine's ./launch.sh, at the other end of an ssh connection."""

    def __init__(self, host: str, hosts: Hosts, node: int, port: int, command: list[str]) -> None:
        """Starts it. command: of ./launch.sh, with its arguments; the others as in LocalNode."""
        self.name = host
        self.kill_deadline: float | None = None  # on the monotonic clock
        env = [
            f"{name}={value}"
            for name, value in os.environ.items()
            if name.startswith(PASSED_ON) and not SECRET.search(name)
        ]
        remote_command = [
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
                *("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5"),
                host,
                f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(remote_command)}",
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._send(json.dumps(hosts))

    def _send(self, line: str) -> None:
        assert self.process.stdin
        self.sent_at = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        self._send("stop")

    def keep_alive(self) -> None:
        """Sends a sign of life if the last line is some time ago."""
        if time.monotonic() > self.sent_at + ALIVE_SECONDS:
            self._send("alive")

    def kill(self) -> None:
        """Asks for it; called again and again, it cuts a connection that does not answer."""
        self._send("kill")
        if self.kill_deadline is None:
            self.kill_deadline = time.monotonic() + KILL_SECONDS
        if time.monotonic() > self.kill_deadline:
            self.process.kill()


class StopSignals:
    """What signals, or the machine that started this one, ask for: `stop`, and then `kill`.

    A second signal kills, unless it comes within a second of the first: then it is the same
    request, which arrived twice.
    """

    def __init__(self, commands: io.FileIO | None) -> None:
        """commands: the standard input, where another machine started this one."""
        self.stop = False
        self.kill = False
        self.commands = commands
        self.since = 0.0  # of the first request, on the monotonic clock
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, or a script's `&`
                signal.signal(number, self._on_signal)
        if commands:
            threading.Thread(target=self._listen, args=(commands,), daemon=True).start()

    def _on_signal(self, number, frame) -> None:
        if not self.stop:
            self.since = time.monotonic()
            self.stop = True
        elif time.monotonic() > self.since + REPEAT_SECONDS:
            self.kill = True

    def _listen(self, commands: io.FileIO) -> None:
        while select.select([commands], [], [], SILENCE_SECONDS)[0]:
            word = commands.readline()
            if not word:  # closed
                break
            if word != b"alive\n":
                self.stop = True
                self.kill = word == b"kill\n"
        self.stop = True


def supervise(nodes: Sequence[LocalNode | RemoteNode], requests: StopSignals, grace: float) -> int:
    """Waits for the ranks of all nodes, and stops them on request or when some ended badly.

    grace: the seconds that ranks have after a stop. Returns the exit code of the first node that
    ended badly, or 0.
    """
    deadline = math.inf
    stopping = False
    code = 0
    while running := [node for node in nodes if node.process.poll() is None]:
        failed = next((node for node in nodes if node.process.returncode), None)
        # ssh's own failure: that node's ranks may live. They are told by their end of the line.
        unreachable = failed is not None and failed.process.returncode == SSH_FAILED
        if (requests.stop or unreachable) and not stopping:
            stopping = True
            deadline = min(deadline, time.monotonic() + grace)
            for node in running:
                node.stop()
            if not requests.commands and not unreachable:
                print_message("stopping, the ranks save first (once more: stop at once)")
        if failed and not code:
            code = failed.process.returncode
            deadline = min(deadline, time.monotonic() + (grace if unreachable else REPORT_SECONDS))
            reason = " (ssh: the connection)" if unreachable else ""
            print_message(f"{failed.name} ended with {code}{reason}; the others stop")
        if requests.kill or time.monotonic() >= deadline:
            for node in running:
                node.kill()
        for node in running:
            node.keep_alive()
        time.sleep(0.1)
    for node in nodes:
        node.kill()  # whatever is left behind
    return code or next((node.process.returncode for node in nodes if node.process.returncode), 0)


def print_message(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody need read it
        print(f"launch.sh: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A port that is free now, so that two runs can share a machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def signal_exit_code(code: int) -> int:
    """128 + N where a rank died by signal N, as a shell has it; other codes stay.

    subprocess returns -N, and `start_ranks` exits with 256 - N.
    """
    if code < 0:
        return 128 - code
    return 384 - code if code > 192 else code


def main(argv: list[str] | None = None) -> None:
    """`COMMAND [--gpus N] [--hostfile FILE [--node-rank K]] [what COMMAND takes]`."""
    name, *args = sys.argv[1:] if argv is None else argv
    commands = None
    try:
        grace = read_number("LOOP_GRACE_SECONDS", 120)
        port = read_number("MASTER_PORT", 0, most=65535)
        options = take_options(args, {"--gpus": None, "--hostfile": None, "--node-rank": None})
        hostfile = options["--hostfile"]
        node = options["--node-rank"]
        if hostfile is None:  # other machines have interfaces of their own
            check_network_names()
        if hostfile == "-":
            # Without a buffer: a thread that waits at its lock could not be left behind.
            commands = open(0, "rb", buffering=0, closefd=False)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        hosts = find_hosts(options["--gpus"], hostfile, node, visible, commands)
    except ConfigError as error:
        exit_with_config_error(error)
    if not port:
        port = DEFAULT_PORT if node else free_port()
    requests = StopSignals(commands)
    if hostfile and not node:
        # The port was free here. Where it is not on the first machine, MASTER_PORT names another.
        nodes = [
            RemoteNode(host, hosts, number, port, [name, *args])
            for number, host in enumerate(hosts)
        ]
        code = supervise(nodes, requests, grace + 5)
    else:
        address = "127.0.0.1"
        if hostfile:
            address = os.environ.get("MASTER_ADDR") or next(iter(hosts)).split("@")[-1]
        command = [f"loop.commands.{name}", *args]
        local = LocalNode(hosts, int(node or 0), address, port, command)
        code = run_here(local, requests, grace)
    exit_process(code if code >= 0 else 128 - code)


def run_here(local: LocalNode, requests: StopSignals, grace: float) -> int:
    """The exit code of this machine's ranks, once they have ended; says where a signal did that."""
    ended_with = supervise([local], requests, grace)
    code = signal_exit_code(ended_with)
    if code != ended_with and not requests.stop:
        print_message(f"signal {code - 128} ended a rank (9 often means: out of memory)")
    return code


if __name__ == "__main__":
    main()
