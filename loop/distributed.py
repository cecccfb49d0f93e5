"""Ranks, and how they agree: start-up, sums over ranks, and the wish to stop."""

import ctypes
import datetime
import os
import signal
import time

import deepspeed
import torch
import torch.distributed as dist


class Ranks:
    """Who this process is among the run's processes."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

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
    ranks = Ranks()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)  # `python -m loop.train` without a launcher is a world of one
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)  # before anything is loaded, or every rank quantises on GPU 0
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles a C++ helper at start-up
    _die_with_parent()
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=timeout_minutes), verbose=False
    )
    return ranks


def _die_with_parent() -> None:
    """Linux: this rank gets SIGTERM when its launcher dies, so that no rank trains on as an orphan."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return  # not Linux: the launcher's own clean-up has to do


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the loop reads at a step boundary; a second signal stops at once.

    One Ctrl-C may arrive twice (terminal and launcher), so a repeat within three seconds counts as the same request."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        if self.signal and time.monotonic() - self._since > 3:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this rank."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
