"""A request to stop: SIGTERM, SIGINT, SIGUSR1, or the end of run.max_hours.

The loop reads it between two steps, saves and ends. A thread sees to the two cases that no signal
covers: ./launch.sh was killed, or no step ended within the grace time.
"""

import os
import signal
import sys
import threading
import time

import psutil

REPEAT_SECONDS = 3  # one Ctrl-C may arrive twice, from the terminal and from the launcher
WATCH_SECONDS = 2


class StopRequest:
    """Turns signals and the end of `max_hours` into a flag that the loop reads at a step boundary.

    A second signal ends the process at once, with code 128 + its number; within three seconds of
    the first one it counts as the same request. A thread ends the process with code 1 when no step
    boundary came within LOOP_GRACE_SECONDS (120) of the request, and makes a request itself when
    ./launch.sh was killed: its pid, LOOP_LAUNCHER_PID, is gone then.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._reason: str | None = None
        self._requested_at = 0.0  # on the monotonic clock
        self._end = float("inf")  # on the monotonic clock
        if max_hours:
            # Wall time: what Python and the libraries took to start counts as well.
            started = time.time() - psutil.Process().create_time()
            self._end = time.monotonic() - started + max_hours * 3600
        self._grace_seconds = float(os.environ.get("LOOP_GRACE_SECONDS") or 120)
        self._launcher_pid = int(os.environ.get("LOOP_LAUNCHER_PID", 0))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why the run is to stop: a signal's name or "run.max_hours". None as long as it is not."""
        if not self._reason and time.monotonic() > self._end:
            self._request("run.max_hours")
        return self._reason

    @property
    def requested(self) -> bool:
        """True once this rank was asked to stop; other ranks may not have been."""
        return self.reason is not None

    def _request(self, reason: str) -> None:
        self._requested_at = time.monotonic()  # first: the thread reads it when there is a reason
        self._reason = reason

    def _on_signal(self, number, frame) -> None:
        if not self._reason:
            self._request(signal.Signals(number).name)
        elif time.monotonic() - self._requested_at > REPEAT_SECONDS:
            os._exit(128 + number)

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if self.reason:
                if time.monotonic() - self._requested_at > self._grace_seconds:
                    sys.stderr.write(
                        f"error: asked to stop ({self._reason}), and not at a step's end within "
                        f"LOOP_GRACE_SECONDS={self._grace_seconds:g}\n"
                    )
                    os._exit(1)
            elif self._launcher_is_gone():
                self._on_signal(signal.SIGTERM, None)

    def _launcher_is_gone(self) -> bool:
        """True where /proc exists and holds no process of the launcher's pid."""
        if not self._launcher_pid or not os.path.exists("/proc/self"):
            return False
        return not os.path.exists(f"/proc/{self._launcher_pid}")
