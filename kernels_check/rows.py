"""A check answers in rows. This file makes them and judges them."""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass
class Row:
    """One line of the table. `error` and `bound` are relative unless the name says otherwise; `speed` is in `unit`,
    where "x" means times as fast as the plain reference. A row that is `required` and not ok or slow stops training."""

    what: str
    version: str = ""
    verdict: str = "ok"  # ok | slow | wrong | missing
    error: float | None = None
    bound: float | None = None
    speed: float | None = None
    unit: str = "x"
    note: str = ""  # the reason and the remedy where the verdict is not ok; else a remark
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
    """wrong where the error passes its bound or is no number, slow where the speed is under `slowest`, otherwise ok."""
    row = Row(what, version, "ok", error, bound, speed, unit)
    if not math.isfinite(error):
        row.verdict, row.error, row.note = "wrong", None, f"the result holds NaN or inf; {remedy}"
    elif error > bound:
        row.verdict, row.note = "wrong", remedy
    elif speed is not None and speed < slowest:
        row.verdict, row.note = "slow", f"under {slowest:g} {unit}: right, but {remedy}"
    return row


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| over all elements, in float64; NaN stays NaN."""
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).norm() / reference.norm()).item()


def best_seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Shortest wall time of `run` after one call that warms it up: what other programs add to a time is never negative.
    A GPU is waited for before each reading of the clock."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
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
    text = next(
        (line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no message"
    )
    if "undefined symbol" in str(error):
        remedy = "it was built for another torch: install the build for this one, or build it from source"
        return Row(what, "", "wrong", note=f"{text[:160]}; {remedy}", required=required)
    if isinstance(error, ModuleNotFoundError):
        remedy = "; install it (./launch.sh help: setup)" if text.startswith("No module") else ""
        return Row(what, "", "missing", note=text[:160] + remedy, required=required)
    return Row(what, "", "wrong", note=f"{type(error).__name__}: {text[:160]}", required=required)


def guarded(
    what: str, check: Callable[..., Iterable[Row]], *args, required: bool = True, **kwargs
) -> Iterator[Row]:
    """The rows of a check; where it raises, the rows so far and one that says so. The traceback goes to stderr.
    `required=False` holds for all of them."""
    try:
        for row in check(*args, **kwargs):
            row.required = row.required and required
            yield row
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield failure(what, error, required)
