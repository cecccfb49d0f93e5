"""How a process ends: with one line on stderr, and with the exit code that was meant.

Exit code 2 is a user's mistake, 1 any other failure.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import time
from typing import NoReturn

from ..config.cli import printable


def exit_with_config_error(error: Exception) -> NoReturn:
    """Ends this rank with one line on stderr and exit code 2.

    Where all ranks make the same mistake, rank 0 reports it, and the launcher ends the others while
    they wait. A rank that is alone with its mistake reports it after that wait.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        exit_process(2, f"error: {error}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)
    exit_process(2, f"error on rank {rank}: {error}")


class OutputLost(OSError):
    """Standard output can't be written: what was asked for is lost. Exit code 1."""


class StandardStream(io.FileIO):
    """Standard output or error, where a reader who has gone is no failure.

    As under `| head`, or when a terminal was closed: what a command saves, it saves nevertheless.
    """

    def __init__(self, descriptor: int, is_log: bool) -> None:
        """is_log: nothing is lost that is not elsewhere, so that a full disk is no failure."""
        super().__init__(descriptor, "w", closefd=False)
        self.is_log = is_log

    def write(self, data) -> int:
        """As io.FileIO's; what can't be written counts as written. Raises OutputLost."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if not self.is_log and error.errno not in (errno.EPIPE, errno.EIO):
                raise OutputLost(error.strerror) from None
            return memoryview(data).nbytes


def guard_streams(output_is_log: bool) -> None:
    """Lets standard output and error take any character, and outlive those who read them.

    A character that they can't show is written as an escape. The streams of tests stay theirs.

    Args:
        output_is_log: standard output tells what is kept elsewhere, as standard error does.
    """
    for name, is_log in (("stdout", output_is_log), ("stderr", True)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        with contextlib.suppress(OSError):  # of a fork whose stream was a file before
            stream.reconfigure(errors="backslashreplace")
            if stream is getattr(sys, f"__{name}__"):
                raw = StandardStream(stream.fileno(), is_log)
                text = io.TextIOWrapper(
                    raw,  # as `python -u` has it: without a buffer
                    encoding=stream.encoding,
                    errors="backslashreplace",
                    write_through=True,
                )
                setattr(sys, name, text)


def exit_process(code: int, message: str = "") -> NoReturn:
    """Ends this process with an exit code, after a message on stderr.

    Once it belongs to a process group it does not end by sys.exit: gloo's threads may then abort
    it, with a code of their own.
    """
    if message:
        message = "\n".join(printable(line, 2000) for line in message.split("\n"))
        sys.stderr.write(message + "\n")  # one write: the lines of several ranks must not mix
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
