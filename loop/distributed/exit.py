"""From the command line to a configuration: YAML + `key=value`, every mistake one line that names the key."""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn


def exit_with_config_error(error: Exception) -> NoReturn:
    """One line on stderr and exit code 2. Where all ranks make the same mistake, rank 0 says it and the launcher ends the others
    while they wait; a rank that is alone with its mistake gets to say it after that."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    exit_process(2, f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}")


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Prints, and ends quietly where nobody listens any more (`| head`, a terminal that was closed): no failure, since all is saved."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is left in the buffer goes there


def exit_process(code: int, message: str = "") -> NoReturn:
    """Ends this process. Not by sys.exit once it belongs to a process group: gloo's threads may then abort it, with a code of their own."""
    if message:
        sys.stderr.write(message + "\n")  # one write: lines must not mix
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
