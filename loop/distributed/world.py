"""The processes of a run: how they start together, and how they agree.

`init_distributed` joins the process group. The `Ranks` it returns says who this process is, and has
the few collectives that the loop itself needs; ZeRO-3 has its own.
"""

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

from ..config.device import uses_gpu
from ..config.schema import ConfigError, RunConfig
from .hosts import check_network_names, read_number
from .rendezvous import join_process_group, keep_to_this_machine
from .stop import StopRequest
from .timeline import timed

COLLECTIVE_TIMEOUT_MINUTES = 30  # where no watchdog looks on
# Without a launcher, as in `python -m loop.train`, this process is a world of one.
SINGLE_PROCESS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def on_gpu() -> bool:
    """True where DeepSpeed computes on NVIDIA GPUs; DS_ACCELERATOR=cpu says no on any machine.

    Raises ConfigError for a GPU that is here and that torch can't use.
    """
    return uses_gpu() and get_accelerator().device_name() == "cuda"


class Ranks:
    """This process among the run's processes, and what they exchange.

    Every rank must call each of the collectives, in the same order; one that does not would keep
    the others waiting until the process group's timeout.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        # Not torch.cuda.is_available() alone: DS_ACCELERATOR=cpu means the CPU where GPUs are too.
        self.device = torch.device(get_accelerator().current_device_name() if on_gpu() else "cpu")

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes files."""
        return self.rank == 0

    def sum_scalars(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64. Several ranks wait for the GPU."""
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.all_reduce_sum(tensor).tolist()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place, and returns it. Does not wait for the GPU."""
        dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when the flag is true on one of them."""
        return self.sum_scalars(float(flag))[0] > 0

    def all(self, flag: bool) -> bool:
        """True on every rank when the flag is true on all of them."""
        return not self.any(not flag)

    def all_gather_json(self, value: Any) -> list:
        """Every rank's value, in the order of ranks. A value is of JSON's types.

        The values travel as JSON text in byte tensors, as torch's own object collectives pickle.
        """
        data = bytearray(json.dumps(value).encode())
        text = torch.frombuffer(data, dtype=torch.uint8).to(self.device)
        sizes = [
            torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)
        ]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        longest = max(map(int, sizes))
        texts = [torch.empty(longest, dtype=torch.uint8, device=self.device) for _ in sizes]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(t[: int(size)].tolist())) for t, size in zip(texts, sizes)]


@timed("ranks")
def init_distributed(run: RunConfig | None = None, stop: StopRequest | None = None) -> Ranks:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this process's `Ranks`.

    Ranks wait `run.rendezvous_timeout_minutes` for each other; run=None takes the default of 10.
    A training run gives its `stop`: a request to stop then ends that waiting, and a collective may
    take 3 * run.stall_timeout_minutes, so that the watchdog speaks first. Without `stop` there is
    no watchdog, and a collective may take 30 minutes. Where the process group exists already, both
    limits are those it was made with.

    Raises RendezvousError where not all ranks come.
    """
    run = run or RunConfig()
    minutes = 3 * run.stall_timeout_minutes if stop else COLLECTIVE_TIMEOUT_MINUTES
    timeout = datetime.timedelta(minutes=minutes)
    read_rank_environment()
    keep_to_this_machine()
    if on_gpu():
        backend = "nccl"
        # Before anything is loaded, or every rank would quantise on GPU 0.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        backend = "gloo"
        # oneDNN keeps what it compiled for each of 1,024 shapes, up to a GiB.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        # Otherwise DeepSpeed compiles a C++ helper at start-up.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _terminate_with_parent()
    if not dist.is_initialized():
        join_process_group(backend, run.rendezvous_timeout_minutes, timeout, stop)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return Ranks()


def read_rank_environment() -> None:
    """Completes what a launcher says of this rank in the environment. Raises ConfigError.

    An empty variable counts as absent.
    """
    for name, value in SINGLE_PROCESS.items():
        os.environ[name] = os.environ.get(name) or value
    world_size = read_number("WORLD_SIZE", 1)
    if world_size < 1 or read_number("RANK", 0) >= world_size:
        raise ConfigError(
            f"RANK={os.environ['RANK']}, WORLD_SIZE={world_size}: a rank must lie below the number "
            "of ranks; unset both, or start the run by ./launch.sh or torchrun"
        )
    read_number("LOCAL_RANK", 0)
    read_number("MASTER_PORT", 0, most=65535)
    check_network_names()


def _terminate_with_parent() -> None:
    """Linux: this rank gets SIGTERM when the process that started it dies; no orphan trains on."""
    # On other systems the launcher's own clean-up has to do.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
