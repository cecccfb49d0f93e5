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
    "ceilings",
)
OPTIONAL = ("compiled", "fused", "ceilings")  # training starts without them
TOGETHER = (
    "compiled",
    "zero3",
    "environment",
)  # side by side, the longest first: what they find does not hang on the clock


def rows_of(name: str) -> Iterator[Row]:
    """The rows of `kernels_check.NAME`. A package that can't be imported has its own row in the environment's check."""
    try:
        yield from importlib.import_module(f"kernels_check.{name}").main()
    except ImportError as error:
        yield Row(
            name,
            "",
            "missing",
            note=f"not checked: {str(error).splitlines()[0][:160]}; see the row of that package",
        )


def answer(check: Callable[[], Iterable[Row]], out: Path, log: Path) -> None:
    """In the check's process: a JSON line a row, at once, so that what was found before a segfault or a hang is kept."""
    os.setpgid(0, 0)  # a group of its own, which its ranks join
    send_output_to(log)
    with out.open("w") as file:
        for row in check():
            print(json.dumps(asdict(row)), file=file, flush=True)


@dataclass
class Running:
    """A check under way: its process, what it has answered and what it has printed."""

    name: str
    required: bool
    folder: tempfile.TemporaryDirectory
    process: BaseProcess

    def end(self) -> None:
        """Ends the check and its ranks, which may be waiting for it or for one another."""
        assert self.process.pid is not None  # it was started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def begin(check: Callable[[], Iterable[Row]], name: str, required: bool = True) -> Running:
    folder = tempfile.TemporaryDirectory()
    process = context().Process(
        target=answer, args=(check, Path(folder.name, "rows"), Path(folder.name, "log"))
    )
    process.start()
    return Running(name, required, folder, process)


def finish(running: Running, timeout: float = 120) -> list[Row]:
    """The check's rows; a crash, a time-out or silence adds one more, under the check's name."""
    running.process.join(timeout)
    code = running.process.exitcode
    if code != 0:
        running.end()
    out, log = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (Path(running.folder.name, n) for n in ("rows", "log"))
    )
    running.folder.cleanup()
    rows = [Row(**json.loads(line)) for line in out.splitlines() if line.endswith("}")]
    if code is None:
        trouble = f"no end within {timeout:g} s"
    elif code < 0:
        trouble = f"killed by {signal.Signals(-code).name} {f'after the row {rows[-1].what!r}' if rows else 'before its first row'}"
    elif code or not rows:
        trouble = f"exit {code} after {len(rows)} rows: {([line.strip() for line in log.splitlines() if line.strip()] or ['no message'])[-1][:160]}"
    else:
        return rows
    return [
        *rows,
        Row(
            running.name,
            "",
            "wrong",
            note=f"{trouble}; see `python -m kernels_check.{running.name}`",
            required=running.required,
        ),
    ]


def run_all() -> list[Row]:
    """Every check's rows, in the order of CHECKS."""

    def start(name: str) -> Running:
        required = name not in OPTIONAL
        return begin(partial(guarded, name, rows_of, name, required=required), name, required)

    with tempfile.NamedTemporaryFile() as log, output_to(log.name):
        context()  # the server starts here: what libraries and ranks print goes where it writes
    running, found = {name: start(name) for name in TOGETHER}, {}
    try:
        for name in (*TOGETHER, *(name for name in CHECKS if name not in TOGETHER)):
            print(
                f"\rchecking {name:<12}", end="", file=sys.stderr, flush=True
            ) if sys.stderr.isatty() else None
            running[name] = running.get(name) or start(name)
            found[name] = finish(running[name])
    finally:
        for check in running.values():
            check.end()  # interrupted: nothing goes on unseen
    print("\r" + " " * 24 + "\r", end="", file=sys.stderr) if sys.stderr.isatty() else None
    return [row for name in CHECKS for row in found[name]]
