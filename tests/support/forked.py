"""Python processes that begin with PyTorch, DeepSpeed and PEFT imported: forks of one process.

Importing them takes some five seconds of a CPU, and most tests start several processes. `start`
forks from a process that has imported them once, and nothing of this project. All else is as in a
fresh interpreter: arguments, environment, folder, streams, exit code. What needs a fresh one (other
values of what libraries read at import, other options of Python) gets one.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

LIBRARIES = ("deepspeed", "peft", "bitsandbytes", "transformers.models.llama.modeling_llama")
# Of the environment: what libraries or Python read at import.
AT_IMPORT = "BNB CUDA DS_ HF_ KMP LD_ MKL OMP OPENBLAS PYTHON TORCH TRANSFORMERS TRITON XDG".split()
CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
LONGEST = 2**20  # bytes of a request


class Forked:
    """A forked Python, with what the tests use of subprocess.Popen."""

    def __init__(self, args: list[str], pid: int, status: socket.socket, stdout, stderr) -> None:
        self.args, self.pid, self.stdout, self.stderr = args, pid, stdout, stderr
        self.returncode: int | None = None
        self._status = status

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                answer = self._status.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = int(answer or -signal.SIGKILL)  # nothing: the zygote is gone
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        texts: dict[int, str] = {}

        def read(number: int, stream) -> None:
            texts[number] = stream.read()

        streams = [s for s in (self.stdout, self.stderr) if s]
        readers = [
            threading.Thread(target=read, args=each, daemon=True) for each in enumerate(streams)
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():  # a child of its own still writes
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return texts[0], texts.get(1)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The process that has imported the libraries, and the way to ask it for a fork."""

    def __init__(self) -> None:
        self.environment = at_import(os.environ | CPU)
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.requests.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=os.environ | CPU,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def fork(self, args: list[str], env: dict, cwd: Path, stderr: int) -> Forked:
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, out_end = os.pipe()
        err, err_end = os.pipe() if stderr == subprocess.PIPE else (None, os.dup(out_end))
        request = {"args": args, "env": env, "cwd": str(cwd)}
        given = [theirs.fileno(), out_end, err_end]
        socket.send_fds(self.requests, [json.dumps(request).encode()], given)
        theirs.close()
        os.close(out_end)
        os.close(err_end)
        pid = int(status.recv(64))
        stdout, stderr_ = (None if fd is None else os.fdopen(fd) for fd in (out, err))
        return Forked([sys.executable, *args], pid, status, stdout, stderr_)


zygotes: dict[int, Zygote] = {}  # by the process that asked: pytest's


def at_import(env) -> dict[str, str]:
    """What of an environment must be that of the zygote."""
    read = {k: v for k, v in env.items() if k.startswith(tuple(AT_IMPORT)) and k != "PYTHONPATH"}
    return read


def start(args: list[str], env: dict, cwd: Path, stderr: int = subprocess.PIPE):
    """Starts `python ARGS` with this environment; its standard output is a pipe of text.

    Args:
        stderr: subprocess.PIPE, or subprocess.STDOUT: the same pipe.

    Returns: a Forked, or a subprocess.Popen where a fork can't do it.
    """
    plain = args[0] in ("-c", "-m") or not args[0].startswith("-")
    zygote = zygotes.get(os.getpid()) or Zygote()
    zygotes[os.getpid()] = zygote
    if plain and at_import(env) == zygote.environment:
        return zygote.fork(args, env, cwd, stderr)
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


# --- in the zygote and its forks -----------------------------------------------------------------


def serve(requests: socket.socket) -> tuple[dict, list[int]] | None:
    """Forks for each request. Returns in a fork: (its request, its standard output and error);
    in the zygote None, once nobody can ask any more.
    """
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: dict[int, socket.socket] = {}  # pid: where its exit code is awaited
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            report_ended(running)
        if requests in ready:
            text, fds, _, _ = socket.recv_fds(requests, LONGEST, 3)
            if not text:
                break
            status = socket.socket(fileno=fds[0])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (requests, status, *running.values()):
                    each.close()
                os.close(woken)
                os.close(wake)
                return json.loads(text), fds[1:]
            running[pid] = status
            status.send(str(pid).encode())
            os.close(fds[1])
            os.close(fds[2])
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return None


def report_ended(running: dict[int, socket.socket]) -> None:
    """Sends the exit codes of the forks that have ended, those of signals negative."""
    for pid in list(running):
        ended, state = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = running.pop(pid)
            with contextlib.suppress(OSError):  # nobody waits for it
                status.send(str(os.waitstatus_to_exitcode(state)).encode())
            status.close()


def run(request: dict, streams: list[int], installed: list[str]) -> None:
    """In a fork: what `python ARGS` does. `installed` is where the libraries are."""
    (first, *rest), env = request["args"], request["env"]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(request["cwd"])
    for number, fd in enumerate(streams, 1):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    own = os.getcwd() if first == "-m" else "" if first == "-c" else os.path.dirname(first)
    sys.path[:] = [own, *split_paths(env), *installed]
    if first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = [first, *rest[1:]] if first == "-c" else [first, *rest]
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first != "-c":
        main.__file__ = first
    source = rest[0] if first == "-c" else Path(first).read_text()
    exec(compile(source, "<string>" if first == "-c" else first, "exec"), vars(main))


def split_paths(env) -> list[str]:
    return [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]


def main() -> None:
    installed = [path for path in sys.path[1:] if path not in split_paths(os.environ)]
    for name in LIBRARIES:
        importlib.import_module(name)
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked:
        run(*asked, installed)


if __name__ == "__main__":
    main()
