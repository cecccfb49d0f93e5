"""Runs a check on two local ranks: gloo on the CPU, NCCL over the first two GPUs, one rank where there is one GPU."""

import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

from kernels_check.rows import Row


def _rank(rank: int, body: Callable, world_size: int, port: int, rows, args: tuple) -> None:
    cuda = torch.cuda.is_available()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    found = list(body("cuda" if cuda else "cpu", *args))
    if rank == 0:
        rows.put(found)
    dist.destroy_process_group()


def on_ranks(body: Callable[..., Iterator[Row]], *args) -> list[Row]:
    """The rows of rank 0 of `body(device, *args)`, which all ranks run; it and its arguments are pickled, so they stand at
    the top of a module. Raises what a rank raised, with its traceback."""
    world_size = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rows = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (body, world_size, port, rows, args), nprocs=world_size)
    return rows.get()
