"""What the runs of a sweep came to: a table, and the winner by `monitor.best`."""

import json
from typing import NamedTuple

from ..checkpoint.run_dir import read_report, whole_lines
from ..config.cli import load_config
from ..config.schema import Config, ConfigError
from ..distributed.files import write_atomically
from ..evaluation.choosing import Choice
from .grid import Run, Sweep


class Result(NamedTuple):
    """How far a run has come."""

    value: float | None  # of the best validation, by `monitor.best`
    step: int | None  # of that validation
    steps: int  # made so far
    finished: bool


def is_same_run(config: Config) -> bool:
    """Whether what lies in the run's folder was made with this configuration."""
    try:
        earlier = load_config(["--config", str(config.folder / "config.yaml")])
    except ConfigError:
        return False
    return earlier.model_copy(update={"run": config.run}) == config


def read_result(run: Run) -> Result:
    """What the run's folder says."""
    config = run.config
    report = read_report(config.folder)
    steps = report.get("steps")
    steps = steps if isinstance(steps, int) else 0  # of a damaged report
    ended = bool(report.get("ended_early")) or 0 < steps == report.get("planned_steps")
    choice = Choice.of(config)
    best: tuple[float | None, int | None] = (None, None)
    log = config.folder / "metrics.jsonl"
    for figures in whole_lines(log.read_text(errors="replace")) if log.is_file() else []:
        value = choice.value(figures)
        if choice.is_better(value, best[0]):
            best = (value, figures["step"])
    return Result(*best, steps, ended and is_same_run(config))


def winner(sweep: Sweep, results: list[Result]) -> int | None:
    """The number of the finished run with the best value; None where none has one."""
    best = None
    for number, result in enumerate(results):
        choice = Choice.of(sweep.runs[number].config)
        if result.finished and choice.is_better(
            result.value, None if best is None else results[best].value
        ):
            best = number
    return best


def as_table(sweep: Sweep, results: list[Result], failed: dict[int, int]) -> str:
    """A line for each run, and one on the winner. failed: exit codes by the run's number."""
    choice = Choice.of(sweep.runs[0].config)
    rows = [[*sweep.runs[0].values, str(choice), "at step", "steps", ""]]
    best = winner(sweep, results)
    for number, (run, result) in enumerate(zip(sweep.runs, results)):
        state = "finished" if result.finished else "not finished"
        if number in failed:
            state = f"failed, exit code {failed[number]}"
        value = "" if result.value is None else f"{result.value:.4f}"
        cells = [value, "" if result.step is None else str(result.step), str(result.steps)]
        rows.append([*run.values.values(), *cells, "best" if number == best else state])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if best is None:
        return "\n".join([*lines, "no run has finished with a value to compare by"])
    config = sweep.runs[best].config
    return "\n".join([*lines, f"best by {choice}: {config.folder}"])


def write_results(sweep: Sweep, results: list[Result]) -> None:
    """Writes sweep.json: the values and the result of each run, and the folder of the winner.

    Raises OSError.
    """
    best = winner(sweep, results)
    rows = [
        {"run": run.config.run.name, **run.values, **result._asdict()}
        for run, result in zip(sweep.runs, results)
    ]
    choice = Choice.of(sweep.runs[0].config)
    content = {"by": str(choice), "best": None if best is None else rows[best]["run"], "runs": rows}
    write_atomically(sweep.folder / "sweep.json", json.dumps(content, indent=1) + "\n")
