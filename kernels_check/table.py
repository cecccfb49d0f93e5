"""The rows as a person reads them."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from kernels_check.rows import Row

HEADER = ("what", "version", "verdict", "error (bound)", "speed")


def error_text(row: Row) -> str:
    """The error with its bound, "" without one."""
    if row.error is None:
        return ""
    bound = f"{row.bound:.0e}" if row.bound else "0"
    return f"{row.error:.1e} ({bound})"


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, then a line for each note: a row that is not ok always has one."""
    cells = [HEADER]
    for row in rows:
        speed = "" if row.speed is None else f"{row.speed:.3g} {row.unit}"
        cells.append((row.what, row.version, row.verdict, error_text(row), speed))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    notes = []
    for row in rows:
        if row.note:
            optional = "" if row.required else ", not required"
            notes.append(f"{row.verdict}{optional}: {row.what}: {row.note}")
    if notes:
        lines += ["", *notes]
    return "\n".join(lines)


def emit(rows: Iterable[Row]) -> None:
    """One check alone (`python -m kernels_check.NAME`): a table on a terminal, else JSON lines."""
    if sys.stdout.isatty():
        print(table(list(rows)))
        return
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
