"""What ends a run before its time: a signal, the time limit, a rank that died or stands still.

A collective waits for every rank, so one that is gone or hangs would hold all others for as long as the process group allows. Each
rank writes once a second into the run's folder what it is doing, `heartbeat/rank-0.json`, and reads what the next rank wrote. Who finds a loss
writes it down for all, so a second costs each rank three small files, however many ranks there are.
"""

import os
import signal
import sys
import threading
import time

import psutil


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and the end of `max_hours` into a flag that the loop reads at a step boundary; a second signal
    stops at once.

    One Ctrl-C may arrive twice (terminal and launcher), so a repeat within three seconds counts as the same request. A thread sees
    to two cases that no signal covers: launch.sh was killed (its pid is gone), or no step boundary came within the grace time."""

    def __init__(self, max_hours: float | None = None) -> None:
        self._reason: str | None = None
        self._since = 0.0
        # a limit is one of wall time, so what Python and the libraries took to start counts as well
        self._end = psutil.Process().create_time() + max_hours * 3600 if max_hours else float("inf")
        self._grace = float(os.environ.get("LOOP_GRACE_SECONDS") or 120)
        self._launcher = int(os.environ.get("LOOP_LAUNCHER_PID", 0))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why the run shall stop, None as long as it shall not."""
        if not self._reason and time.time() > self._end:
            self._reason, self._since = "run.max_hours", time.monotonic()
        return self._reason

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def _on_signal(self, number, frame) -> None:
        if self._reason and time.monotonic() - self._since > 3:
            os._exit(128 + number)
        if not self._reason:
            self._reason, self._since = signal.Signals(number).name, time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(2)
            if self.reason and time.monotonic() - self._since > self._grace:
                sys.stderr.write(
                    f"error: asked to stop ({self.reason}), and not at a step's end within LOOP_GRACE_SECONDS={self._grace:g}\n"
                )
                os._exit(1)
            if (
                self._launcher
                and not self.reason
                and not os.path.exists(f"/proc/{self._launcher}")
                and os.path.exists("/proc/self")
            ):
                self._on_signal(signal.SIGTERM, None)
