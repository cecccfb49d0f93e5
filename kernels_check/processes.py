"""A process for each check and each rank.

The faults to be found include segfaults and hangs (a flash-attn of another ABI, a collective that
never ends). They must become rows, not the end of the table.
Imports took most of the check's time. So the processes are forked from a server that has imported
the libraries once (multiprocessing's "forkserver"). Where that does not work they are new
interpreters.
"""

import contextlib
import functools
import multiprocessing
import os
from multiprocessing.context import ForkServerContext, SpawnContext

import torch


def _fork_works() -> None:
    """In a forked process: exit code 0 where CUDA is untouched and torch's threads still work.

    A hang is one way to fail.
    """
    torch.ones(1 << 20).sum().item()
    raise SystemExit(torch.cuda._is_in_bad_fork())


@functools.cache
def context() -> ForkServerContext | SpawnContext:
    """The kind of process that works here.

    The server takes seconds to start. Then one process is tried out, in milliseconds.
    """
    # "Is there a GPU" must not touch CUDA before a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["kernels_check.preload"])
    with contextlib.suppress(OSError, EOFError):  # the server itself died of an import
        probe = forking.Process(target=_fork_works)
        probe.start()
        probe.join(60)
        if probe.exitcode == 0:
            return forking
        probe.kill()
    return multiprocessing.get_context("spawn")


def send_output_to(path: str | os.PathLike) -> None:
    """Sends what this process and its children print, C libraries included, to a file."""
    with open(path, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


@contextlib.contextmanager
def output_to(path: str | os.PathLike):
    """The same within a `with` block."""
    originals = os.dup(1), os.dup(2)
    send_output_to(path)
    try:
        yield
    finally:
        for number, original in enumerate(originals, start=1):
            os.dup2(original, number)
            os.close(original)
