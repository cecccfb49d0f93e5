"""The rows as a person reads them."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from kernels_check.rows import Row


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, then a line for each that has something to say: always where it is not ok."""
    cells = [("what", "version", "verdict", "error (bound)", "speed")]
    for row in rows:
        error = (
            ""
            if row.error is None
            else f"{row.error:.1e} ({row.bound:.0e})"
            if row.bound
            else f"{row.error:.1e} (0)"
        )
        speed = "" if row.speed is None else f"{row.speed:.3g} {row.unit}"
        cells.append((row.what, row.version, row.verdict, error, speed))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    notes = [
        f"{row.verdict}{'' if row.required else ', not required'}: {row.what}: {row.note}"
        for row in rows
        if row.note
    ]
    return "\n".join([*lines, "", *notes] if notes else lines)


def emit(rows: Iterable[Row]) -> None:
    """One check alone, `python -m kernels_check.NAME`: the table on a terminal, JSON lines into a pipe or a file."""
    if sys.stdout.isatty():
        print(table(list(rows)))
        return
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
