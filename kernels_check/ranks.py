"""Runs a check on local ranks, and ZeRO-3 on them.

The ranks are NCCL over all GPUs; without a GPU they are two ranks over gloo.
"""

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


def _run_rank(
    rank: int, body: Callable, world_size: int, port: int, group: int, answer, args: tuple
) -> None:
    """In a rank's process: runs the body, and puts rank 0's rows (or ImportError) into `answer`."""
    os.setpgid(0, group)  # that of the check, so that whoever ends the check ends its ranks
    has_gpu = torch.cuda.is_available()
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    if has_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=timedelta(seconds=60))
    result: list[Row] | ImportError
    try:
        result = list(body("cuda" if has_gpu else "cpu", *args))
    # On all ranks alike. The environment's rows report the package itself.
    except ImportError as error:
        result = error
    if rank == 0:
        answer.put(result)
    dist.destroy_process_group()


def on_ranks(body: Callable[..., Iterator[Row]], *args, world_size: int | None = None) -> list[Row]:
    """The rows of rank 0 of `body(device, *args)`, which all ranks run.

    The body and its arguments are pickled, so they must be at the top level of a module.
    Raises what a rank raised, with its traceback.
    """
    world_size = world_size or torch.cuda.device_count() or 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A check's own process has imported the libraries, and has used neither torch's threads nor
    # CUDA yet. So it can simply be forked.
    in_check = multiprocessing.parent_process() is not None
    processes = multiprocessing.get_context("fork") if in_check else context()
    answer = processes.SimpleQueue()
    torch.multiprocessing.start_processes(
        _run_rank,
        (body, world_size, port, os.getpgrp(), answer, args),
        nprocs=world_size,
        start_method=processes.get_start_method(),
    )
    result = answer.get()
    if isinstance(result, ImportError):
        raise result
    return result


def zero3_config(micro_batches: int, **changes) -> dict[str, Any]:
    """The project's `ds_config.json` for steps of so many micro-batches, with `changes`.

    Small tensors are partitioned, too. It computes in bf16, also where the loop itself would not.
    """
    config = json.loads((Path(__file__).parent.parent / "ds_config.json").read_text()) | changes
    return config | {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": config["zero_optimization"]
        | {"stage3_param_persistence_threshold": 0},
    }


def zero3_engine(model: torch.nn.Module, config: dict[str, Any]):
    """The engine for `model`, whose one trained parameter is `model.trained`.

    Every rank must call it.
    """
    import deepspeed

    # Otherwise a CPU would compile this operator now, and needs ninja for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    optimizer = torch.optim.AdamW([model.get_parameter("trained")], lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
