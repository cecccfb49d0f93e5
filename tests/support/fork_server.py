"""Python processes that begin with the libraries imported: forks of this one.

Importing PyTorch, DeepSpeed and PEFT takes some six seconds of a CPU, and the tests start more than
a hundred processes. start_server() starts this file for a run of the tests and returns the path of
a `python` (fork_client.py), to be used as Python itself: helpers.PYTHON, LOOP_PYTHON. The libraries
are imported at its first use, nothing of this project is. sys.executable remains the true Python,
for what tests start-up itself.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from fork_client import LONGEST  # noqa: E402

LIBRARIES = (
    "deepspeed",
    "peft",
    "bitsandbytes",
    "transformers.models.llama.modeling_llama",
    "torch.utils.tensorboard",
)
# How the names begin of what Python and the libraries read from the environment at import. A
# request with others than the server's gets no fork.
AT_IMPORT = (
    *("BNB", "CUDA", "DS_", "HF_", "KMP", "LANG", "LC_", "LD_", "MKL", "NUMEXPR", "OPENBLAS"),
    *("PYTHON", "TORCH", "TRANSFORMERS", "TRITON", "XDG"),
)
# Others may differ: a fork has its own path, libraries and loop/monitor/quiet.py set three
# themselves, and GPUs need a driver.
APART = {
    *("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUTF8", "PYTORCH_NVML_BASED_CUDA_CHECK"),
    "TORCHINDUCTOR_CACHE_DIR",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
} | (set() if Path("/dev/nvidiactl").exists() else {"CUDA_VISIBLE_DEVICES"})
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PR_SET_PDEATHSIG = 1


def start_server(libraries: tuple[str, ...] = LIBRARIES) -> str:
    """Starts the server, which ends with this process. Returns the path of its `python`."""
    folder = Path(tempfile.mkdtemp(prefix="soap-python-"))
    client = folder / "python"
    names = f"{str(Path(__file__).parent)!r})\nfrom fork_client import be_python"
    client.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {names}\n"
        f"be_python({sys.executable!r}, {str(client)!r}, sys.argv[1:])\n"
    )
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(64)
        server = subprocess.Popen(
            [sys.executable, "-u", __file__, str(client), str(listening.fileno()), *libraries],
            env=os.environ | CPU,
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    atexit.register(server.communicate)
    return str(client)


class Server:
    """Forks for each client, and tells it how its fork has ended."""

    def __init__(self, listening: socket.socket, libraries: list[str]) -> None:
        self.listening, self.libraries = listening, libraries
        self.environment = read_at_import(os.environ)
        self.clients: dict[socket.socket, int] = {}  # the pid of the fork; 0 before its request
        self.woken, self.wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake)

    def serve(self) -> dict | None:
        """Returns in a fork: its request; in the server None, at the end of standard input."""
        while True:
            ready, _, _ = select.select([0, self.listening, self.woken, *self.clients], [], [])
            if 0 in ready:
                return None
            if self.listening in ready:
                self.clients[self.listening.accept()[0]] = 0
            if self.woken in ready:
                os.read(self.woken, 4096)
            for client in self.clients.keys() & ready:
                if request := self.hear(client):
                    return request
            self.report_ended()

    def hear(self, client: socket.socket) -> dict | None:
        """Takes a client's message: its request, or the number of a signal. Returns as serve()."""
        text, streams = b"", []
        with contextlib.suppress(ConnectionError):
            text, streams, _, _ = socket.recv_fds(client, LONGEST, 3)
        if pid := self.clients[client]:  # it has not been waited for: the number is still its own
            os.kill(pid, int(text or signal.SIGKILL))
        if not text:  # the client was killed
            if pid:
                os.waitpid(pid, 0)
            self.forget(client)
        if pid or not text:
            return None
        request = json.loads(text)
        if read_at_import(request["env"]) == self.environment:
            self.import_libraries()
            self.clients[client] = os.fork()
            if self.clients[client] == 0:
                self.become_fork(request["ignored"], streams)
                return request
        else:
            client.send(b"none")
            self.forget(client)
        for fd in streams:
            os.close(fd)
        return None

    def import_libraries(self) -> None:
        for name in self.libraries:
            importlib.import_module(name)
        gc.freeze()

    def report_ended(self) -> None:
        for client, pid in list(self.clients.items()):
            ended, state = os.waitpid(pid, os.WNOHANG) if pid else (0, 0)
            if ended:
                with contextlib.suppress(OSError):  # the client was killed just now
                    client.send(b"%d" % os.waitstatus_to_exitcode(state))
                self.forget(client)

    def forget(self, client: socket.socket) -> None:
        del self.clients[client]
        client.close()

    def become_fork(self, ignored: list[int], streams: list[int]) -> None:
        """Has the signals and the open files of a new process. It ends with the server."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        for each in (self.listening, *self.clients):
            each.close()
        for fd in (self.woken, self.wake, *streams):
            os.close(fd)


def read_at_import(env) -> dict[str, str]:
    return {k: v for k, v in env.items() if k.startswith(AT_IMPORT) and k not in APART}


def be_python(request: dict, client: str, installed: list[str]) -> None:
    """In a fork: what `python ARGS` does, where packages are `installed`."""
    (first, *rest), env = request["args"], request["env"]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(request["cwd"])
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    tempfile.tempdir = None
    sys.executable = client
    own = {"-m": os.getcwd(), "-c": ""}.get(first, os.path.dirname(first))
    paths = python_path(env)
    sys.path[:] = [*([] if env.get("PYTHONSAFEPATH") else [own]), *paths, *installed]
    if any(Path(path, "sitecustomize.py").exists() for path in paths):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    run(first, rest)


def python_path(env) -> list[str]:
    return [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]


def run(first: str, rest: list[str]) -> None:
    """What `python FIRST REST...` runs: -m and a module, -c and code, or a file."""
    if first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    client, what, *rest = sys.argv[1:]
    if what == "-m":  # a true Python whose own processes are clients
        sys.executable = client
        if not os.environ.get("PYTHONSAFEPATH"):
            sys.path[0] = os.getcwd()
        return run(what, rest)
    installed = [path for path in sys.path[1:] if path not in python_path(os.environ)]
    request = Server(socket.socket(fileno=int(what)), rest).serve()
    if request:
        be_python(request, client, installed)
    else:
        shutil.rmtree(Path(client).parent)


if __name__ == "__main__":
    main()
