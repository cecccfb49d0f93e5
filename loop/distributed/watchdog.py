"""What ends a run before its time: a signal, the time limit, a rank that died or stands still.

A collective waits for every rank, so one that is gone or hangs would hold all others for as long as the process group allows. Each
rank writes once a second into the run's folder what it is doing, `heartbeat/rank-0.json`, and reads what the next rank wrote. Who finds a loss
writes it down for all, so a second costs each rank three small files, however many ranks there are.
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

from .world import Ranks

_activity: dict[str, Any] = {
    "step": 0,
    "doing": "starting",
    "turns": 0,
    "since": time.time(),
}  # of this process; `doing` is its only writer


def set_activity(what: str, step: int | None = None) -> None:
    """Records what this rank is about to do. If it hangs or dies, a watchdog quotes this."""
    _activity.update(
        doing=what,
        step=_activity["step"] if step is None else step,
        turns=_activity["turns"] + 1,
        since=time.time(),
    )


class RankLost(RuntimeError):
    """Another rank died, and what this one computed with it has failed. Exit code 1: nothing that was typed need be wrong."""


class Watchdog:
    """While it is entered, this rank ends with code 1 when another one died, when one on another machine has written nothing for
    `heartbeat_timeout_minutes`, or when any stands still for `stall_timeout_minutes`.

    A rank that ends well takes its file away; one that fails leaves it with the error's name. What files of an earlier run say is
    not believed: they carry another token. Every rank must come here (the token is agreed on)."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        stall_timeout_minutes: float,
        heartbeat_timeout_minutes: float = 1,
    ) -> None:
        self.folder, self.ranks, self.timeout, self.silence = (
            folder / "heartbeat",
            ranks,
            60 * stall_timeout_minutes,
            60 * heartbeat_timeout_minutes,
        )
        self.heard: dict[
            int, tuple[float, float]
        ] = {}  # of each rank: when it wrote last by its clock, and when that was read by ours
        namespace = (
            os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
        )
        self.me = {
            "rank": ranks.rank,
            "pid": os.getpid(),
            "host": f"{socket.gethostname()} {namespace}",
            "token": ranks.all_gather_json(time.time_ns())[0],
        }
        self.over = threading.Event()

    def __enter__(self) -> "Watchdog":
        set_activity("starting", step=0)
        self._write()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.over.set()
        if kind is None:
            with contextlib.suppress(OSError):
                self._file(self.ranks.rank).unlink()
            return
        self._write(ended=kind.__name__)
        if issubclass(
            kind, RuntimeError
        ):  # perhaps a collective that failed because another rank is gone: say which
            self._lost(self._others())
            time.sleep(1 if all(beat["host"] == self.me["host"] for beat in self._others()) else 5)
            if lost := self._lost(
                self._others(), silence=4
            ):  # a connection broke, and beats come once a second
                if isinstance(error, dist.DistError) or "gloo" in str(
                    error
                ):  # what a collective says; NCCL's is a DistError
                    raise RankLost(self._ending(lost)) from error
                sys.stderr.write(f"{lost}\n")

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self, path: Path | None = None, **more) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self._file(self.ranks.rank).with_suffix(".writing")
            aside.write_text(json.dumps(self.me | _activity | {"alive": time.time()} | more))
            aside.replace(path or self._file(self.ranks.rank))

    def _read(self, *paths: Path) -> list[dict]:
        """What other ranks of this run wrote last into these files."""
        found = []
        for path in paths:
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text()))
        return [
            beat
            for beat in found
            if beat["token"] == self.me["token"] and beat["rank"] != self.ranks.rank
        ]

    def _others(self) -> list[dict]:
        return self._read(*sorted(self.folder.glob("rank-*.json")))

    def _lost(self, beats: list[dict], silence: float | None = None) -> str | None:
        """The rank that died, in words. Only the pids of one's own machine can be looked at; of another one's, whether they still write."""
        now = time.monotonic()
        for beat in sorted(
            beats, key=lambda beat: "ended" in beat
        ):  # who ended with an error may have done so for one that just died
            if beat["alive"] != self.heard.get(beat["rank"], (0, 0))[0]:
                self.heard[beat["rank"]] = beat["alive"], now
            if "lost" in beat:
                return beat["lost"]
            if "ended" in beat:
                return f"rank {beat['rank']} ended with {beat['ended']} {_where(beat)}"
            if beat["host"] == self.me["host"] and not _lives(beat["pid"]):
                return f"rank {beat['rank']} (pid {beat['pid']}) died {_where(beat)}"
            if beat["host"] != self.me["host"] and now - self.heard[beat["rank"]][1] > (
                silence or self.silence
            ):
                return f"nothing is heard from rank {beat['rank']} on {beat['host'].split()[0]} any more; it was {_where(beat)}"
        return None

    def _stalled(self) -> str | None:
        """The rank that all wait for, in words: one that is frozen, or else the one that has come least far."""
        if time.time() - _activity["since"] < self.timeout:
            return None
        beats = [self.me | _activity | {"alive": time.time()}, *self._others()]
        frozen = [
            beat for beat in beats if beat["alive"] < time.time() - self.timeout / 2
        ]  # not even its thread writes
        beat = min(frozen or beats, key=lambda b: b["turns"])
        return f"rank {beat['rank']} stands still {_where(beat)}, and run.stall_timeout_minutes is over"

    def _ending(self, reason: str) -> str:
        return f"{reason}; rank {self.ranks.rank} ends {_where(_activity)}. The next start goes on from the newest checkpoint"

    def _watch(self) -> None:
        following, lost = (
            self._file((self.ranks.rank + 1) % self.ranks.world_size),
            self.folder / "lost.json",
        )
        while not self.over.wait(1.0):
            self._write()
            stalled = self._stalled()
            reason = stalled or self._lost(self._read(following, lost))
            if not reason or (
                not stalled and self.over.wait(3)
            ):  # a rank that ends like the lost one may do so by itself
                continue
            self._write(lost, lost=reason)
            sys.stderr.write(f"error: {self._ending(reason)}\n")
            if stalled:
                faulthandler.dump_traceback()
            os._exit(1)


def _where(beat: dict) -> str:
    return f"in step {beat['step']} ({beat['doing']}, for {time.time() - beat['since']:.0f} s)"


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
