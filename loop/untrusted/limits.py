"""What a stranger wrote runs with a limit of time and memory.

A chat template is a program. It is tried once in a child process, which can be killed whatever it
does; after that each call is limited in this process, which costs microseconds.
"""

import contextlib
import os
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

TRIAL_SECONDS = 10.0
CALL_SECONDS = 10.0
MEMORY = 2**30  # bytes, beyond what the process has mapped
MOST_ANSWER = 2**16


class LimitError(RuntimeError):
    """Something took more time or memory than it may, or died."""


@contextlib.contextmanager
def limited(seconds: float = CALL_SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """A context that raises LimitError after `seconds`, or when `memory` more bytes were mapped.

    The clock needs the main thread, in others only memory is limited.
    """
    old_limit = _limit_memory(memory)
    in_main = threading.current_thread() is threading.main_thread()

    def on_alarm(number, frame):
        raise LimitError(f"took more than {seconds:g} s")

    if in_main:
        handler = signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except (MemoryError, OverflowError) as error:
        raise LimitError(f"took more than {memory / 2**30:g} GiB of memory") from error
    except RecursionError as error:
        raise LimitError("calls itself without an end") from error
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        if old_limit:
            resource.setrlimit(resource.RLIMIT_AS, old_limit)


def _limit_memory(memory: int) -> tuple[int, int] | None:
    """Limits what this process may map from now on; returns the limit before, None without one."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = mapped + memory
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *limits]), hard))
    except (OSError, ValueError):  # a system that can't tell, or can't limit
        return None
    return soft, hard


def try_in_child(work: Callable[[], str], seconds: float = TRIAL_SECONDS) -> str:
    """The text that `work` returns in a forked child, which may take MEMORY more bytes.

    Raises LimitError where it took too long, or died, and with `work`'s own error in words.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child only renders and tokenises
        pid = os.fork()
    if pid == 0:
        _answer(work, read, write)
    os.close(write)
    try:
        answer = _read_all(read, seconds)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if answer is None:
        raise LimitError(f"took more than {seconds:g} s")
    kind, _, text = answer.partition(":")
    if kind == "done":
        return text
    raise LimitError(text or "died")


def _answer(work: Callable[[], str], read: int, write: int) -> None:
    """In the child: writes what `work` returned, or why it failed, and ends."""
    try:
        os.close(read)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory(MEMORY)
        try:
            text = f"done:{work()}"
        except (MemoryError, OverflowError):
            text = f"failed:took more than {MEMORY / 2**30:g} GiB of memory"
        except RecursionError:
            text = "failed:calls itself without an end"
        except LimitError as error:
            text = f"failed:{error}"
        except BaseException as error:  # a template may raise anything
            text = f"failed:raised {type(error).__name__}"
        os.write(write, text.encode("utf-8", "backslashreplace")[:MOST_ANSWER])
    finally:
        os._exit(0)


def _read_all(descriptor: int, seconds: float) -> str | None:
    """All that comes before the other end closes; None where that takes longer."""
    end = time.monotonic() + seconds
    parts = b""
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        block = os.read(descriptor, MOST_ANSWER)
        if not block:
            return parts.decode("utf-8", "replace")
        parts += block
