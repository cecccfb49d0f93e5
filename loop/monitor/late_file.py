"""Logs that outlast a full disk: what can't be written waits in memory until there is room."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter

PREFIX = "events.out.tfevents."
MOST_WAITING = 2**26  # bytes of a file; what comes then is lost


class LateFile:
    """A file that is appended to. Where a write fails, a later one goes on with the next byte."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._file = open(os.open(path, flags, 0o600), "ab", buffering=0)
        self._waiting = bytearray()
        self.lost = 0  # records that came when too much was waiting

    def write(self, record: bytes) -> None:
        """Takes a record; `flush` writes it."""
        if len(self._waiting) + len(record) > MOST_WAITING:
            self.lost += 1
        else:
            self._waiting += record

    def flush(self) -> None:
        """Writes what waits. Raises OSError where that fails, and it waits on."""
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def sync(self) -> None:
        """Like `flush`, and it is on the disk then."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Raises OSError where what waits can't be written."""
        try:
            self.flush()
        finally:
            self._file.close()


def _stamps(folder: Path) -> Iterator[float]:
    """The times in the names of a folder's event files."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(ValueError):
            yield float(".".join(path.name.removeprefix(PREFIX).split(".")[:2]))


class _Events(FileWriter):
    """torch's FileWriter on a LateFile."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names, and the clock may have
        # been set back since the last one.
        stamp = max([time.time(), *(found + 1e-5 for found in _stamps(folder))])
        name = f"{PREFIX}{stamp:.6f}.{socket.gethostname()}.{os.getpid()}"
        self.event_writer = self  # of FileWriter's other methods
        self.file = LateFile(folder / name)
        self.folder = folder

    def get_logdir(self) -> str:
        return str(self.folder)

    def add_event(self, event, step=None, walltime=None) -> None:
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        RecordWriter(self.file).write(event.SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class EventLog(SummaryWriter):
    """A SummaryWriter of torch that writes when `flush` is called.

    TensorBoard's own way, a thread, ends at the first write that fails, with a traceback.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Opens a new file. TensorBoard drops what earlier ones hold from `purge_step` on.

        Raises OSError.
        """
        self.events = _Events(folder)
        super().__init__(str(folder))
        for event in (
            Event(step=purge_step, file_version="brain.Event:2"),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        ):
            self.events.add_event(event)
        self.flush()

    def _get_file_writer(self):
        writers: Any = {self.log_dir: self.events}
        self.file_writer = writers[self.log_dir]
        self.all_writers = writers
        return self.events
