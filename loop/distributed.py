"""Ranks, and how they agree: start-up, sums over ranks, and the wish to stop."""

import ctypes
import datetime
import os
import signal
import threading
import time

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


def on_gpu() -> bool:
    return get_accelerator().device_name() == "cuda" and torch.cuda.is_available()


class Ranks:
    """Who this process is among the run's processes."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        # DeepSpeed's accelerator, not torch.cuda.is_available(): DS_ACCELERATOR=cpu means the CPU on a machine with GPUs too.
        self.device = torch.device(get_accelerator().current_device_name() if on_gpu() else "cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums figures over all ranks, in float64. Every rank must call it."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one of them."""
        return self.sum(float(flag))[0] > 0


def init_distributed(timeout_minutes: float = 30) -> Ranks:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this process's place in it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)  # `python -m loop.train` without a launcher is a world of one
    if on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is loaded, or every rank quantises on GPU 0
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles a C++ helper at start-up
    _die_with_parent()
    backend, timeout = "nccl" if on_gpu() else "gloo", datetime.timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return Ranks()


def _die_with_parent() -> None:
    """Linux: this rank gets SIGTERM when the process that started it dies, so that no rank trains on as an orphan."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return  # not Linux: the launcher's own clean-up has to do


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the loop reads at a step boundary; a second signal stops at once.

    One Ctrl-C may arrive twice (terminal and launcher), so a repeat within three seconds counts as the same request. A thread sees
    to two cases that no signal covers: launch.sh was killed (its pid is gone), or no step boundary came within the grace time."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0
        self._grace = float(os.environ.get("LOOP_GRACE_SECONDS", 120))
        self._launcher = int(os.environ.get("LOOP_LAUNCHER_PID", 0))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, number, frame) -> None:
        if self.signal and time.monotonic() - self._since > 3:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(2)
            if self.signal and time.monotonic() - self._since > self._grace:
                os._exit(1)
            if self._launcher and not self.signal and not os.path.exists(f"/proc/{self._launcher}") and os.path.exists("/proc/self"):
                self._on_signal(signal.SIGTERM, None)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this rank."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
