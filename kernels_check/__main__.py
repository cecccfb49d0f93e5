"""`python -m kernels_check [--json FILE]`: every check, one table. Exit 0 where QLoRA training can start, 1 where it can't.

Each check runs in a process of its own with a time limit, because the faults looked for include segfaults and hangs
(a flash-attn of another ABI, a collective that never ends), and those must become rows, not the end of the table.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kernels_check.rows import Row

CHECKS = ("environment", "attention", "nf4", "optimizers", "zero3", "collectives", "compiled", "ceilings")
OPTIONAL = ("compiled", "ceilings")  # training starts without them
ROOT = Path(__file__).parent.parent


def run_check(command: Sequence[str], name: str, timeout: float = 120, required: bool = True) -> list[Row]:
    """The rows that `command` prints; a crash, a time-out or silence adds one more, under the check's name."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        out, err = child.communicate(timeout=timeout)
        trouble = ""
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the ranks that it started too
        out, err = child.communicate()
        trouble = f"no end within {timeout:g} s"
    rows = [Row(**json.loads(line)) for line in out.splitlines() if line.startswith('{"what": ')]
    if not trouble and child.returncode < 0:
        trouble = f"killed by {signal.Signals(-child.returncode).name}"
    elif not trouble and (child.returncode or not rows):
        last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), "no message")
        trouble = f"exit {child.returncode} after {len(rows)} rows: {last[:160]}"
    if trouble:
        rows.append(Row(name, "", "wrong", note=f"{trouble}; see `python -m kernels_check.{name}`", required=required))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, then a line for each that is not ok."""
    cells = [("what", "version", "verdict", "error (bound)", "speed")]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e} ({row.bound:.0e})" if row.bound else f"{row.error:.1e} (0)"
        speed = "" if row.speed is None else f"{row.speed:.3g} {row.unit}"
        cells.append((row.what, row.version, row.verdict, error, speed))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    notes = [f"{row.verdict}{'' if row.required else ', not required'}: {row.what}: {row.note}" for row in rows if row.verdict != "ok"]
    return "\n".join([*lines, "", *notes] if notes else lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_check", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    target = parser.parse_args().json
    start, rows = time.perf_counter(), []
    for name in CHECKS:
        print(f"\rchecking {name:<12}", end="", file=sys.stderr, flush=True) if sys.stderr.isatty() else None
        rows += run_check([sys.executable, "-m", f"kernels_check.{name}"], name, required=name not in OPTIONAL)
    print("\r" + table(rows) if sys.stderr.isatty() else table(rows))
    blocking = [row.what for row in rows if row.blocks()]
    verdict = f"QLoRA training can't start: {', '.join(blocking)}" if blocking else "QLoRA training can start"
    print(f"\n{verdict} ({time.perf_counter() - start:.0f} s)")
    if target:
        target.write_text(json.dumps({"can_start": not blocking, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if blocking else 0


if __name__ == "__main__":
    raise SystemExit(main())
