"""Ends this rank when another one died or stands still.

A collective waits for every rank, so one that is gone or hangs would hold all the others until the
process group's timeout. Each rank therefore writes once a second what it is doing into
`heartbeat/rank-0.json` of the run directory, and reads what the next rank wrote. Whoever finds a
rank lost writes that down for all in `heartbeat/lost.json`. So a second costs each rank three small
files, however many ranks there are.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from ..config.schema import RunConfig
from .world import Ranks

BEAT_SECONDS = 1.0
RECHECK_SECONDS = 3  # a rank that fails like the lost one may end by itself, with its own message
PAUSE_SECONDS = 10  # between two turns of the watchdog: the process was stopped or suspended
BROKEN_CONNECTION_SECONDS = 4  # after a collective failed, so long a silence means a lost rank

# What this process does now; only `set_activity` writes it.
# doing: in words; turns: how many activities there were; since: when this one began, on the
# monotonic clock: a machine that was suspended, or whose clock was set, makes no rank late.
_activity: dict[str, Any] = {"step": 0, "doing": "starting", "turns": 0}
_activity["since"] = time.monotonic()


def set_activity(what: str, step: int | None = None) -> None:
    """Records what this rank is about to do. If it hangs or dies, a watchdog quotes this."""
    _activity.update(
        doing=what,
        step=_activity["step"] if step is None else step,
        turns=_activity["turns"] + 1,
        since=time.monotonic(),
    )


class RankLost(RuntimeError):
    """Another rank died, and this one's collective failed with it.

    Exit code 1: nothing that was typed need be wrong.
    """


class Watchdog:
    """A context in which this rank ends with code 1 when another one is lost.

    Lost is a rank that died; one on another machine that wrote nothing for
    `run.heartbeat_timeout_minutes`; and one that stands still for `run.stall_timeout_minutes`.

    A rank that ends well deletes its file; one that fails leaves it with the error's name. Files
    that an earlier run left carry another token and are ignored. Every rank must construct a
    Watchdog, as the token is agreed on.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, run: RunConfig) -> None:
        self.folder = run_dir / "heartbeat"
        self.ranks = ranks
        self.stall_seconds = 60 * run.stall_timeout_minutes
        self.heartbeat_seconds = 60 * run.heartbeat_timeout_minutes
        # Of each rank: when its file was written, and when this rank read that by its own clock.
        self.last_beats: dict[int, tuple[int, float]] = {}
        self.me = {
            "rank": ranks.rank,
            "pid": os.getpid(),
            "host": f"{socket.gethostname()} {_pid_namespace()}",
            "token": ranks.all_gather_json(time.time_ns())[0],
        }
        self.over = threading.Event()

    def __enter__(self) -> "Watchdog":
        set_activity("starting", step=0)
        self._write(self._file(self.ranks.rank))
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Raises RankLost instead of the error of a collective that failed with another rank."""
        self.over.set()
        if kind is None:
            with contextlib.suppress(OSError):
                self._file(self.ranks.rank).unlink()
            return
        self._write(self._file(self.ranks.rank), ended=kind.__name__)
        if not issubclass(kind, RuntimeError):
            return
        # Perhaps a collective that failed because another rank is gone. Find out which.
        others = self._others()
        self._find_lost(others)  # notes when each of them wrote last
        all_on_this_host = all(beat["host"] == self.me["host"] for beat in self._others())
        time.sleep(1 if all_on_this_host else 5)
        lost = self._find_lost(self._others(), BROKEN_CONNECTION_SECONDS)
        if not lost:
            return
        # A collective's own error: NCCL's is a DistError, gloo's a RuntimeError that names gloo.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RankLost(self._last_words(lost)) from error
        sys.stderr.write(f"{lost}\n")

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self, path: Path, **more) -> None:
        """Writes this rank's heartbeat, and `more`, to a file; complete or not at all.

        A full disk must not end the run: the time of the last heartbeat is a sign of life as well.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self._file(self.ranks.rank).with_suffix(".writing")
            temporary.write_text(json.dumps(self._my_beat() | more))
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(path)

    def _my_beat(self) -> dict:
        now = time.monotonic()
        return self.me | _activity | {"alive": now, "seconds": now - _activity["since"]}

    def _read(self, *paths: Path) -> list[dict]:
        """What other ranks of this run wrote last into these files."""
        beats = []
        for path in paths:
            with contextlib.suppress(OSError, ValueError):
                beats.append(json.loads(path.read_text()) | {"written": path.stat().st_mtime_ns})
        return [
            beat
            for beat in beats
            if beat["token"] == self.me["token"] and beat["rank"] != self.ranks.rank
        ]

    def _others(self) -> list[dict]:
        return self._read(*sorted(self.folder.glob("rank-*.json")))

    def _find_lost(self, beats: list[dict], heartbeat_seconds: float | None = None) -> str | None:
        """The first lost rank of these heartbeats, in words; None if there is none.

        On its own host a rank looks at the others' pids; of another host it sees only whether they
        still write, within `heartbeat_seconds`.
        """
        heartbeat_seconds = heartbeat_seconds or self.heartbeat_seconds
        now = time.monotonic()
        # One that ended with an error may have done so for one that just died: look at it last.
        for beat in sorted(beats, key=lambda beat: "ended" in beat):
            rank = beat["rank"]
            host = beat["host"]
            if beat["written"] != self.last_beats.get(rank, (0, 0))[0]:
                self.last_beats[rank] = beat["written"], now
            if "lost" in beat:
                return beat["lost"]
            if "ended" in beat:
                return f"rank {rank} ended with {beat['ended']} {_describe(beat)}"
            if host == self.me["host"]:
                if not _is_alive(beat["pid"]):
                    return f"rank {rank} (pid {beat['pid']}) died {_describe(beat)}"
            elif now - self.last_beats[rank][1] > heartbeat_seconds:
                return (
                    f"nothing is heard from rank {rank} on {host.split()[0]} any more; "
                    f"it was {_describe(beat)}"
                )
        return None

    def _find_stalled(self) -> str | None:
        """The rank that all wait for, in words; None while this one makes progress.

        That is one that is frozen, as not even its thread writes, or else the one that has come
        least far.
        """
        if time.monotonic() - _activity["since"] < self.stall_seconds:
            return None
        beats = [self._my_beat(), *self._others()]
        frozen = [beat for beat in beats if self._silence(beat) > self.stall_seconds / 2]
        beat = min(frozen or beats, key=lambda beat: beat["turns"])
        return (
            f"rank {beat['rank']} stands still {_describe(beat)}, "
            "and run.stall_timeout_minutes is over"
        )

    def _silence(self, beat: dict) -> float:
        """Seconds since a rank wrote; of one on another machine, since this one read that."""
        now = time.monotonic()
        if beat["host"] == self.me["host"]:
            return now - beat["alive"]
        last = self.last_beats.get(beat["rank"])
        return now - last[1] if last and last[0] == beat["written"] else 0.0

    def _last_words(self, reason: str) -> str:
        return (
            f"{reason}; rank {self.ranks.rank} ends {_describe(_activity)}. "
            "The next start goes on from the newest checkpoint"
        )

    def _forgive_pause(self, last_turn: float) -> float:
        """Counts no time in which this process itself was stopped. Returns the time now."""
        now = time.monotonic()
        pause = now - last_turn - BEAT_SECONDS
        if pause > PAUSE_SECONDS:
            _activity["since"] = min(now, _activity["since"] + pause)
            for rank, (alive, read_at) in self.last_beats.items():
                self.last_beats[rank] = alive, min(now, read_at + pause)
        return now

    def _watch(self) -> None:
        next_rank = self._file((self.ranks.rank + 1) % self.ranks.world_size)
        lost_file = self.folder / "lost.json"
        last_turn = time.monotonic()
        while not self.over.wait(BEAT_SECONDS):
            last_turn = self._forgive_pause(last_turn)
            self._write(self._file(self.ranks.rank))
            stalled = self._find_stalled()
            reason = stalled or self._find_lost(self._read(next_rank, lost_file))
            if not reason:
                continue
            if not stalled and self.over.wait(RECHECK_SECONDS):
                continue
            self._write(lost_file, lost=reason)
            sys.stderr.write(f"error: {self._last_words(reason)}\n")
            if stalled:
                faulthandler.dump_traceback()
            os._exit(1)


def _describe(beat: dict) -> str:
    seconds = beat.get("seconds", time.monotonic() - beat["since"])
    return f"in step {beat['step']} ({beat['doing']}, for {seconds:.0f} s)"


def _pid_namespace() -> int:
    """The number of this process's PID namespace, 0 if unknown. A pid means nothing in another."""
    path = "/proc/self/ns/pid"
    return os.stat(path).st_ino if os.path.exists(path) else 0


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
