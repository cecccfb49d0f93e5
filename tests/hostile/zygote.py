"""Runs commands of the project in processes of their own, without importing it each time.

It reads a case as a line of JSON from standard input: `command`, `argv`, `folder` (where it runs
and may write), `typed` (its standard input), `seconds`. It imports the libraries once, forks for
each case, and answers with a line: `code`, `out`, `err`, `events`. A case has a limit of memory and
a clock; `events` are what it must not do: connect, ask a person, unpickle, start a program, or
write outside its folder.
"""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

MEMORY = 3 * 2**30  # bytes beyond what is mapped after the imports
COMMANDS = ("plan", "preview", "generate", "merge", "train", "export", "audit")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STREAMS = ("stdin", "stdout", "stderr")


def watch(events: list[str], folder: str) -> None:
    """Notes in `events` what Python is about to do and a hostile input must not make it do."""

    def outside(path) -> bool:
        if not isinstance(path, (str, bytes)):
            return False
        path = os.path.realpath(os.fsdecode(path))
        return not path.startswith((folder, "/dev/", "/proc/"))

    def hook(event: str, args: tuple) -> None:
        if event == "socket.connect" and not str(args[1]).startswith(("('127.0.0.1'", "/")):
            events.append(f"connect {args[1]}")
        elif event in ("builtins.input", "pickle.find_class"):
            events.append(event)
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            if outside(args[0]):
                events.append(f"write {args[0]}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and outside(args[0]):
            events.append(f"{event} {args[0]}")

    sys.addaudithook(hook)


def run(case: dict) -> None:
    """In the child: runs the command, writes `code` and `events` to report.json, and ends."""
    folder, events = os.path.realpath(case["folder"]), []
    os.chdir(folder)
    mode = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for number, name in enumerate(STREAMS):
        with open(f".{name}", mode[name]) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode[name], closefd=False, errors="backslashreplace")
        for number, name in enumerate(STREAMS)
    )
    os.environ |= {"TMPDIR": folder, "XDG_CACHE_HOME": folder, "HF_HOME": folder}
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch(events, folder)

    def leave(code: int) -> None:
        Path(".report.json").write_text(json.dumps({"code": code, "events": events}))
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)  # os._exit is replaced

    os._exit = leave
    code = 0
    try:
        module = importlib.import_module(f"loop.commands.{case['command']}")
        module.main(case["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    leave(code)


def wait(pid: int, seconds: float) -> bool:
    """Waits for a child; kills it and returns False where it takes longer."""

    def on_alarm(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        os.waitpid(pid, 0)
        return True
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in COMMANDS:
        importlib.import_module(f"loop.commands.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("deepspeed.runtime.zero.config")
    for line in sys.stdin:
        case = json.loads(line)
        folder = Path(case["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".stdin").write_text(case["typed"])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            run(case)
        in_time = wait(pid, case["seconds"])
        report = folder / ".report.json"
        answer = json.loads(report.read_text()) if report.exists() else {"code": -9, "events": []}
        answer["code"] = answer["code"] if in_time else "time"
        texts = {
            name[3:]: (folder / f".{name}").read_text(errors="replace") for name in STREAMS[1:]
        }
        answers.write(json.dumps(answer | texts) + "\n")


if __name__ == "__main__":
    main()
