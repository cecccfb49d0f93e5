"""A case of hostile input: what is run, and what must hold of it, whatever the input is."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fork_server import CPU
from helpers import PYTHON, ROOT, communicate, free_port

WATCHED = str(Path(__file__).with_name("watched.py"))


@dataclass
class Outcome:
    code: int | str  # the exit code; "time": killed by the clock
    out: str
    err: str
    events: list[str]  # what it did and must not do

    def mistakes(self, codes: tuple[int, ...] = (0, 2), ordinary: tuple = ()) -> list[str]:
        """What this outcome does wrong; [] where it is as promised.

        ordinary: events of the same command with nothing hostile in it.
        """
        found = [f"did: {event}" for event in self.events if event not in ordinary]
        if self.code not in codes:
            found.append(f"ended with {self.code}: {self.err.strip()[-300:]}")
        elif self.code:
            lines = [line for line in self.err.splitlines() if line.startswith("error")]
            if len(lines) != 1:
                found.append(f"{len(lines)} lines of error: {self.err[-300:]}")
            elif len(lines[0]) > 1000 or not lines[0].isprintable():
                found.append(f"no line for a terminal: {lines[0][:300]!r}")
        if "Traceback" in self.err:
            found.append("a traceback")
        return found


def run_watched(
    folder: Path, command: str, *argv: str, typed: str = "", seconds: float = 120
) -> Outcome:
    """Runs a command of `loop.commands` in a folder, made if need be: it may write there alone.

    typed: its standard input. seconds: a limit as that of `wait_until`; it is killed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | CPU | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder)}
    env |= {"MASTER_PORT": str(free_port()), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    process = subprocess.Popen(
        [PYTHON, WATCHED, str(folder), command, *argv],
        cwd=folder,
        env=env,
        text=True,
        errors="replace",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    code: int | str
    try:
        out, err = communicate(process, seconds, typed)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        code = "time"
    events = folder / "events"
    noted = events.read_text(errors="replace").splitlines() if events.exists() else []
    events.unlink(missing_ok=True)
    return Outcome(code, out, err, noted)
