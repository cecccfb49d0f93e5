"""What a person is waiting for, and how far it is: on standard error, of the first rank alone.

Nothing is shown of what takes a moment. In a terminal there is a bar, which goes away at the end;
elsewhere, as in a log file, a line now and then.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

FIRST_SECONDS = 10  # until the first line in a log
EVERY_SECONDS = 60  # between two lines
BAR_SECONDS = 2  # until a bar

T = TypeVar("T")


class Progress:
    """A context in which `what` is waited for.

    Its thread shows the time even where nothing advances, as while a library compiles.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        measure: Callable[[], str] | None = None,
    ) -> None:
        """
        Args:
            what: in words, such as "quantising the base".
            total: how many `advance` will count; None: unknown.
            unit: of `total`, in the plural.
            measure: how far it is, in words, where nothing can be counted.
        """
        self.what = what
        self.total = total
        self.unit = unit
        self.measure = measure
        self.count = 0
        self.shown = False
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self.started = time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            watch = self._show_bar if sys.stderr.isatty() else self._write_lines
            self.thread = threading.Thread(target=watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.over.set()
        if self.thread:
            self.thread.join()
        if self.shown and kind is None:
            write_line(f"{self.what}: done in {self._seconds():.0f} s")

    def advance(self, n: int = 1) -> None:
        self.count += n

    def how_far(self) -> str:
        """Such as "120 of 272 modules, 70 s"."""
        parts = [f"{self._seconds():.0f} s"]
        if self.total is not None:
            parts.insert(0, f"{self.count:,} of {self.total:,} {self.unit}")
        elif self.measure:
            parts.insert(0, self.measure())
        return ", ".join(parts)

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _write_lines(self) -> None:
        seconds = FIRST_SECONDS
        while not self.over.wait(seconds):
            write_line(f"{self.what}: {self.how_far()}")
            self.shown = True
            seconds = EVERY_SECONDS

    def _show_bar(self) -> None:
        if self.over.wait(BAR_SECONDS):
            return
        counted = self.total is not None
        with tqdm(
            desc=self.what,
            total=self.total,
            unit=f" {self.unit}" if self.unit else "it",
            leave=False,
            dynamic_ncols=True,
            bar_format=None if counted else "{desc}",
        ) as bar:
            while True:
                bar.n = self.count
                if not counted:
                    bar.set_description_str(f"{self.what}: {self.how_far()}", refresh=False)
                bar.refresh()
                if self.over.wait(1):
                    break


def write_line(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody need read it
        print(text, file=sys.stderr, flush=True)


def track(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """The items one after the other, with their number shown as progress."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.advance()
