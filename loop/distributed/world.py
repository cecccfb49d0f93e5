"""Ranks, and how they agree: start-up, sums over ranks, and what each has to tell the others."""

import contextlib
import ctypes
import datetime
import json
import os
import signal
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from .rendezvous import join_process_group


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
        return self.all_reduce_sum(
            torch.tensor(values, dtype=torch.float64, device=self.device)
        ).tolist()

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place, without waiting for the GPU. Every rank must call it."""
        dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one of them."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: Any) -> list:
        """Every rank's `value`, in the order of ranks. Every rank must call it. The values travel as JSON text in byte tensors, for
        torch's own object collectives pickle."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(
            self.device
        )
        sizes = [
            torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)
        ]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        longest = max(map(int, sizes))
        texts = [torch.empty(longest, dtype=torch.uint8, device=self.device) for _ in sizes]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes)]


def init_distributed(
    rendezvous_timeout_minutes: float = 10, stall_timeout_minutes: float = 30, stop=None
) -> Ranks:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this process's place in it. stall_timeout_minutes: of a collective; stop: ends
    the waiting for ranks. Raises JoinError where not all of them come."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        os.environ.setdefault(
            name, value
        )  # `python -m loop.train` without a launcher is a world of one
    if on_gpu():
        torch.cuda.set_device(
            int(os.environ["LOCAL_RANK"])
        )  # before anything is loaded, or every rank quantises on GPU 0
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # else DeepSpeed compiles a C++ helper at start-up
        )
    _die_with_parent()
    backend, timeout = (
        "nccl" if on_gpu() else "gloo",
        datetime.timedelta(minutes=stall_timeout_minutes),
    )
    if not dist.is_initialized():
        join_process_group(backend, rendezvous_timeout_minutes, timeout, stop)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return Ranks()


def _die_with_parent() -> None:
    """Linux: this rank gets SIGTERM when the process that started it dies, so that no rank trains on as an orphan."""
    with contextlib.suppress(
        OSError, AttributeError
    ):  # not Linux: the launcher's own clean-up has to do
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
