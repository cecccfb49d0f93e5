"""One function for many chunks of rows, on all cores: by forked processes, which are read in order.

A fork has all that this process has read, so only results travel. It computes on the CPU alone, so
an open GPU does not matter, as in torch's own loaders. Where a process dies, or cannot be started,
this one does what is missing.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

CHUNK = 128  # rows of a chunk
FEWEST_CHUNKS = 4  # that are worth processes
PR_SET_PDEATHSIG = 1  # of Linux's prctl

T = TypeVar("T")
R = TypeVar("R")

_task: tuple[Callable[[Any], Any], list[Any]]  # of a forked process


def in_chunks(rows: list[T], size: int | None = None) -> list[list[T]]:
    """The rows, so many at a time; None: CHUNK."""
    size = size or CHUNK
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def map_chunks(
    function: Callable[[list[T]], R], chunks: list[list[T]], on_all_ranks: bool = False
) -> Iterator[R]:
    """`function` of each chunk, in order. It raises what the first chunk that fails raises.

    Args:
        function: depends on its chunk alone; what it returns, and its errors, must be picklable.
        on_all_ranks: all ranks of this machine call it at once, and share the cores.
    """
    done = 0
    sharing = int(os.environ.get("LOCAL_SIZE", 1)) if on_all_ranks else 1
    processes = count_processes(len(chunks), sharing)
    if processes > 1:
        with contextlib.suppress(BrokenProcessPool, OSError):
            for result in _map_in_forks(function, chunks, processes):
                yield result
                done += 1
    for chunk in chunks[done:]:
        yield function(chunk)


def count_processes(num_chunks: int, sharing: int = 1) -> int:
    """How many are worth starting, of so many that share the cores; 1 where there is no fork."""
    if not sys.platform.startswith("linux") or num_chunks < FEWEST_CHUNKS:
        return 1
    cores = len(os.sched_getaffinity(0)) // sharing
    return max(1, min(cores, num_chunks))


def _map_in_forks(function, chunks: list, processes: int) -> Iterator:
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _begin, (function, chunks, os.getpid())
    )
    with pool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which the forks do not need
            results = pool.map(_run, range(len(chunks)))
        yield from results


def _begin(function, chunks: list, parent: int) -> None:
    """In a fork, before its first chunk."""
    global _task
    _task = function, chunks
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's or a scheduler's, for all
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not here
    torch.set_num_threads(1)


def _run(number: int):
    function, chunks = _task
    return function(chunks[number])
