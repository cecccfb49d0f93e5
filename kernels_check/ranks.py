"""Runs a check on local ranks: NCCL over all GPUs, where there is none two ranks over gloo. And ZeRO-3 on them."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from kernels_check.processes import context
from kernels_check.rows import Row


def _rank(
    rank: int, body: Callable, world_size: int, port: int, group: int, answer, args: tuple
) -> None:
    os.setpgid(0, group)  # that of the check, so that whoever ends the check ends its ranks
    cuda = torch.cuda.is_available()
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    try:
        found: list[Row] | ImportError = list(body("cuda" if cuda else "cpu", *args))
    except (
        ImportError
    ) as error:  # on all ranks alike; the environment's rows say it of the package itself
        found = error
    if rank == 0:
        answer.put(found)
    dist.destroy_process_group()


def on_ranks(body: Callable[..., Iterator[Row]], *args, world_size: int | None = None) -> list[Row]:
    """The rows of rank 0 of `body(device, *args)`, which all ranks run; it and its arguments are pickled, so they stand at
    the top of a module. Raises what a rank raised, with its traceback."""
    world_size = world_size or torch.cuda.device_count() or 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A check's own process has imported the libraries, and used neither torch's threads nor CUDA yet: it can simply be forked.
    ways = multiprocessing.get_context("fork") if multiprocessing.parent_process() else context()
    answer = ways.SimpleQueue()
    torch.multiprocessing.start_processes(
        _rank,
        (body, world_size, port, os.getpgrp(), answer, args),
        nprocs=world_size,
        start_method=ways.get_start_method(),
    )
    found = answer.get()
    if isinstance(found, ImportError):
        raise found
    return found


def zero3_config(micro_batches: int, **changes) -> dict[str, Any]:
    """The project's `ds_config.json` for steps of that many micro-batches; small tensors are partitioned too."""
    config = json.loads((Path(__file__).parent.parent / "ds_config.json").read_text()) | changes
    zero = config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    batch = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
    }
    return config | batch | {"zero_optimization": zero}


def zero3_engine(model: torch.nn.Module, config: dict[str, Any]):
    """The engine for `model`, whose one trained parameter is `model.trained`; called on a rank, by all of them."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # or the CPU would compile it now, and needs ninja for it
    )
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([model.get_parameter("trained")], lr=1e-3),
        config=config,
    )[0]
