"""The result of a check, in rows: how they are made and judged."""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass
class Row:
    """One line of the table.

    A row that is `required` and is neither ok nor slow stops training.
    """

    what: str
    version: str = ""
    verdict: str = "ok"  # ok | slow | wrong | missing
    error: float | None = None  # relative, unless the check tells otherwise; so is `bound`
    bound: float | None = None
    speed: float | None = None  # in `unit`
    unit: str = "x"  # "x": times as fast as the plain reference
    note: str = ""  # where it is not ok: the reason and the remedy; else a warning or ""
    required: bool = True

    def blocks(self) -> bool:
        return self.required and self.verdict in ("wrong", "missing")


def judge(
    what: str,
    version: str,
    error: float,
    bound: float,
    remedy: str,
    *,
    speed: float | None = None,
    slowest: float = 0.0,
    unit: str = "x",
) -> Row:
    """The row of a measurement.

    wrong where the error is above `bound` or is no number, slow where the speed is under `slowest`,
    otherwise ok. remedy: what to do where it is not ok.
    """
    row = Row(what, version, "ok", error, bound, speed, unit)
    if not math.isfinite(error):
        row.verdict = "wrong"
        row.error = None
        row.note = f"the result holds NaN or inf; {remedy}"
    elif error > bound:
        row.verdict = "wrong"
        row.note = remedy
    elif speed is not None and speed < slowest:
        row.verdict = "slow"
        row.note = f"under {slowest:g} {unit}: right, but {remedy}"
    return row


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| over all elements, in float64; NaN stays NaN."""
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).norm() / reference.norm()).item()


def best_seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The shortest wall time of `run`, after one call that warms it up.

    The shortest, because other programs can only add to a time. A GPU is waited for before each
    reading of the clock.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def failure(what: str, error: BaseException, required: bool = True) -> Row:
    """The row of a check that raised: an absent library is missing, everything else is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = lines[-1][:160]
    if "undefined symbol" in str(error):
        verdict = "wrong"
        remedy = "install the build for this one, or build it from source"
        note = f"{text}; it was built for another torch: {remedy}"
    elif isinstance(error, ModuleNotFoundError):
        verdict = "missing"
        note = text
        if text.startswith("No module"):
            note += "; install it (./launch.sh help: setup)"
    else:
        verdict = "wrong"
        note = f"{type(error).__name__}: {text}"
    return Row(what, "", verdict, note=note, required=required)


def guarded(
    what: str, check: Callable[..., Iterable[Row]], *args, required: bool = True, **kwargs
) -> Iterator[Row]:
    """The rows of a check. Where it raises, the rows so far and one for the failure.

    The traceback goes to stderr. `required=False` holds for all of its rows.
    """
    try:
        for row in check(*args, **kwargs):
            row.required = row.required and required
            yield row
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield failure(what, error, required)
