"""All-reduce and all-gather over the local ranks: whether they are right, and their bandwidth.

In the field: a container with a small /dev/shm, a broken peer-to-peer path or an NVLink that is not
used makes NCCL hang, fail or crawl over sockets (nccl#342, nccl#606), and ZeRO-3 gathers every
weight twice a step. The bandwidth is the bus bandwidth of nccl-tests: the bytes that each link must
carry, divided by the time.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from kernels_check.ranks import on_ranks
from kernels_check.rows import Row, best_seconds, guarded, judge
from kernels_check.table import emit

SIZES = {"small": 1 << 12, "medium": 1 << 20, "large": 1 << 25}  # bytes
REMEDY = "look at NCCL_DEBUG=INFO, /dev/shm and the topology"
SLOWEST = {"nccl": 5.0, "gloo": 0.02}  # GB/s at the large size: PCIe 3 gives 10, sockets a few


def check_collectives(device: str, all_reduce: Callable, all_gather: Callable) -> Iterator[Row]:
    """A row for each collective and size. `all_reduce(x)` is in place; `all_gather(out, x)`.

    The numbers are integers in fp32, so that the sum is exact in any order.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        version = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        version = f"torch {torch.__version__}"
    for size, num_bytes in SIZES.items():
        base = torch.arange(num_bytes // 4, device=device, dtype=torch.float32) % 1000
        reduced = base + rank
        all_reduce(reduced)
        wanted = base * world_size + sum(range(world_size))
        reduce_error = (reduced - wanted).abs().max().item()
        shard = base[: len(base) // world_size] + rank
        gathered = torch.empty(len(shard) * world_size, device=device)
        all_gather(gathered, shard)
        wanted = torch.cat([base[: len(shard)] + other for other in range(world_size)])
        gather_error = (gathered - wanted).abs().max().item()
        # An all-reduce sends each byte twice: to be summed, and the sum.
        sent = (world_size - 1) / world_size * num_bytes
        run = partial(all_reduce, reduced)
        yield judge_collective("all-reduce", size, version, reduce_error, run, 2 * sent, device)
        run = partial(all_gather, gathered, shard)
        yield judge_collective("all-gather", size, version, gather_error, run, sent, device)


def judge_collective(
    name: str, size: str, version: str, error: float, run: Callable, sent: float, device: str
) -> Row:
    """The row of one collective at one size. Every rank must call it, as it times `run`.

    error: the largest absolute difference; sent: bytes that each link must carry.
    """
    world_size, backend = dist.get_world_size(), dist.get_backend()
    speed = sent / best_seconds(run, device) / 1e9 if world_size > 1 else None
    row = judge(
        f"{backend} {name}, {size}, {world_size} rank(s)",
        version,
        error,
        0.0,
        REMEDY,
        speed=speed,
        slowest=SLOWEST[backend] if size == "large" else 0.0,
        unit="GB/s",
    )
    if world_size == 1 and not row.note:
        row.note = "no bandwidth: with one rank nothing crosses a link"
    return row


def main() -> list[Row]:
    return on_ranks(check_collectives, dist.all_reduce, dist.all_gather_into_tensor)


if __name__ == "__main__":
    emit(guarded("collectives", main))
