"""Where the time of a run goes: every second since the command belongs to one part.

`timed("base")` is a context, or a decorator, for what loads the base. Parts nest: a second counts
for the innermost. `begin` starts a run's account.
"""

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

OTHER = "other"  # what is in no part
START = (
    "launcher",
    "imports",
    "tokenizer",
    "data",
    "ranks",
    "kernel tests",
    "base",
    "engine",
    "CUDA graphs",
)
JOB = (
    "first step",
    "steps",
    "evaluation",
    "sample notes",
    "notes",
    "scores",
    "checkpoints",
    "export",
    "audit",
)


class Timeline:
    """Seconds by part. They add up to all that has passed since `started`, on the monotonic clock,
    which nobody sets.
    """

    def __init__(self, started: float, current: str) -> None:
        self.seconds: dict[str, float] = {}
        self._current = current
        self._since = started

    def enter(self, name: str) -> str:
        """From now on time counts for `name`. Returns the part that it counted for."""
        now = time.monotonic()
        before = self._current
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._current = name
        self._since = now
        return before

    def so_far(self) -> dict[str, float]:
        """Seconds by part until now, in the order of a run, rounded to a millisecond."""
        self.enter(self._current)
        names = [name for name in (*START, *JOB, OTHER) if name in self.seconds]
        names += [name for name in self.seconds if name not in names]
        return {name: round(self.seconds[name], 3) for name in names}


_timeline = Timeline(time.monotonic(), OTHER)


def begin() -> None:
    """Starts the account of a run at the command itself; until now launcher and imports ran."""
    global _timeline
    process = psutil.Process()
    launched = os.environ.get("LOOP_LAUNCHER_PID")
    own_start = command_start = process.create_time()
    if launched:
        with contextlib.suppress(psutil.Error):
            command_start = psutil.Process(int(launched)).create_time()
    _timeline = Timeline(time.monotonic() - (time.time() - own_start), "imports")
    _timeline.seconds["launcher"] = own_start - command_start
    _timeline.enter(OTHER)


def enter(name: str) -> str:
    """From now on time counts for `name`, outside of inner parts."""
    return _timeline.enter(name)


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """A context or decorator whose time counts for `name`."""
    account = _timeline
    before = account.enter(name)
    try:
        yield
    finally:
        account.enter(before)


def so_far() -> dict[str, float]:
    """Seconds by part since the command, in the order of a run."""
    return _timeline.so_far()


def describe(seconds: dict[str, float]) -> str:
    """`12.3 s: imports 5.2, data 1.0`, of parts that took a twentieth of a second or more."""
    parts = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items() if spent >= 0.05)
    return f"{sum(seconds.values()):.1f} s: {parts}"
