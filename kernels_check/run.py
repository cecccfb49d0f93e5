"""Runs the checks, each in a process of its own, and turns their crashes and hangs into rows."""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from kernels_check.processes import context, output_to, send_output_to
from kernels_check.rows import Row, guarded

CHECKS = (
    "environment",
    "attention",
    "nf4",
    "optimizers",
    "zero3",
    "collectives",
    "compiled",
    "fused",
    "fp8",
    "ceilings",
)
OPTIONAL = ("compiled", "fused", "fp8", "ceilings")  # training starts without them
# Side by side, the longest first: their results do not depend on the clock.
CONCURRENT = ("compiled", "zero3", "environment")


def check_rows(name: str) -> Iterator[Row]:
    """The rows of `kernels_check.NAME`.

    A package that can't be imported has its own row in the environment's check.
    """
    try:
        yield from importlib.import_module(f"kernels_check.{name}").main()
    except ImportError as error:
        reason = str(error).splitlines()[0][:160]
        note = f"not checked: {reason}; see the row of that package"
        yield Row(name, "", "missing", note=note)


def write_rows(check: Callable[[], Iterable[Row]], out: Path, log: Path) -> None:
    """In the check's process: writes a JSON line for each row, and what is printed to `log`.

    Each line is written at once, so that a segfault or a hang does not lose the rows before it.
    """
    os.setpgid(0, 0)  # a group of its own, which its ranks join
    send_output_to(log)
    with out.open("w") as file:
        for row in check():
            print(json.dumps(asdict(row)), file=file, flush=True)


@dataclass
class RunningCheck:
    """A check in its process, and the folder with its rows and its log."""

    name: str
    required: bool
    folder: tempfile.TemporaryDirectory
    process: BaseProcess

    def end(self) -> None:
        """Ends the check and its ranks, which may be waiting for it or for one another."""
        assert self.process.pid is not None  # it was started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def read(self, name: str) -> str:
        """A file of the folder; "" where it does not exist."""
        path = Path(self.folder.name, name)
        return path.read_text(errors="replace") if path.exists() else ""


def begin(check: Callable[[], Iterable[Row]], name: str, required: bool = True) -> RunningCheck:
    folder = tempfile.TemporaryDirectory()
    rows, log = Path(folder.name, "rows"), Path(folder.name, "log")
    process = context().Process(target=write_rows, args=(check, rows, log))
    process.start()
    return RunningCheck(name, required, folder, process)


def finish(running: RunningCheck, timeout: float = 120) -> list[Row]:
    """The check's rows; a crash, a time-out or silence adds one more, under the check's name."""
    running.process.join(timeout)
    exit_code = running.process.exitcode
    if exit_code != 0:
        running.end()
    lines = running.read("rows").splitlines()
    log = running.read("log")
    running.folder.cleanup()
    rows = [Row(**json.loads(line)) for line in lines if line.endswith("}")]
    if exit_code == 0 and rows:
        return rows
    if exit_code is None:
        problem = f"no end within {timeout:g} s"
    elif exit_code < 0:
        when = f"after the row {rows[-1].what!r}" if rows else "before its first row"
        problem = f"killed by {signal.Signals(-exit_code).name} {when}"
    else:
        printed = [line.strip() for line in log.splitlines() if line.strip()] or ["no message"]
        problem = f"exit {exit_code} after {len(rows)} rows: {printed[-1][:160]}"
    note = f"{problem}; see `python -m kernels_check.{running.name}`"
    return [*rows, Row(running.name, "", "wrong", note=note, required=running.required)]


def show_progress(text: str) -> None:
    """Writes over the last line, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)


def run_all() -> list[Row]:
    """Every check's rows, in the order of CHECKS."""

    def start(name: str) -> RunningCheck:
        required = name not in OPTIONAL
        return begin(partial(guarded, name, check_rows, name, required=required), name, required)

    with tempfile.NamedTemporaryFile() as log, output_to(log.name):
        context()  # the server starts here: what libraries and ranks print goes where it writes
    running = {name: start(name) for name in CONCURRENT}
    results: dict[str, list[Row]] = {}
    others = [name for name in CHECKS if name not in CONCURRENT]
    try:
        for name in (*CONCURRENT, *others):
            show_progress(f"checking {name:<12}")
            if name not in running:
                running[name] = start(name)
            results[name] = finish(running[name])
    finally:
        for check in running.values():
            check.end()  # after an interruption nothing goes on unseen
    show_progress(" " * 24 + "\r")
    return [row for name in CHECKS for row in results[name]]
