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
from collections.abc import Iterator
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


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """A context for printing: where nobody reads any more, it ends quietly.

    As under `| head`, or when a terminal was closed. That is no failure, since all is saved.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # What is left in the buffer goes there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_any_text() -> None:
    """Lets standard output and error take any character: as an escape where they can't show it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # of a fork whose stream was a file before
                stream.reconfigure(errors="backslashreplace")


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
