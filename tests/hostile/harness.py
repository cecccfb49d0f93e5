"""A case of hostile input: what is run, and what must hold of it, whatever the input is."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT


@dataclass
class Outcome:
    code: int | str  # the exit code; "time": killed by the clock; 99: a traceback; -9: died
    out: str
    err: str
    events: list[str]  # what it did and must not do

    def mistakes(self, codes: tuple[int, ...] = (0, 2)) -> list[str]:
        """What this outcome does wrong; [] where it is as promised."""
        found = [f"did: {event}" for event in self.events]
        if self.code not in codes:
            found.append(f"ended with {self.code}: {self.err.strip()[-300:]}")
        elif self.code == 2:
            lines = [line for line in self.err.splitlines() if line.startswith("error")]
            if len(lines) != 1:
                found.append(f"{len(lines)} lines of error: {self.err[-300:]}")
            elif len(lines[0]) > 1000 or not lines[0].isprintable():
                found.append(f"no line for a terminal: {lines[0][:300]!r}")
        if "Traceback" in self.err:
            found.append("a traceback")
        return found


class Zygote:
    """The process that runs cases; started at the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MASTER_PORT": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def run(self, command: str, *argv: str, typed: str = "", seconds: float = 60) -> Outcome:
        """Runs a command of `loop.commands` in a new folder, `typed` being its standard input."""
        self.count += 1
        folder = self.folder / f"case-{self.count}"
        case = {"command": command, "argv": argv, "folder": str(folder)}
        self.process.stdin.write(json.dumps(case | {"typed": typed, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def zygote_in(folder: Path) -> Iterator[Zygote]:
    zygote = Zygote(folder)
    try:
        yield zygote
    finally:
        zygote.close()
