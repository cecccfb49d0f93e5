"""All-reduce and all-gather over the local ranks: right, and at what bandwidth.

In the field: a container with a small /dev/shm, a broken peer-to-peer path or NVLink that is not used makes NCCL hang, fail
or crawl over sockets (nccl#342, nccl#606), and ZeRO-3 gathers every weight twice a step. Bandwidth is the bus bandwidth
of nccl-tests: bytes that each link must carry, by the time.
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
    """Whole numbers in fp32, so that the sum is exact in any order. `all_reduce(x)` in place, `all_gather(out, x)`."""
    rank, world, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    version = (
        ".".join(map(str, torch.cuda.nccl.version()))
        if device == "cuda"
        else f"torch {torch.__version__}"
    )
    for size, number in SIZES.items():
        base = torch.arange(number // 4, device=device, dtype=torch.float32) % 1000
        reduced = base + rank
        all_reduce(reduced)
        error = (reduced - (base * world + sum(range(world)))).abs().max().item()
        shard = base[: len(base) // world] + rank
        gathered = torch.empty(len(shard) * world, device=device)
        all_gather(gathered, shard)
        wanted = torch.cat([base[: len(shard)] + other for other in range(world)])
        gap = (gathered - wanted).abs().max().item()
        runs = (
            ("all-reduce", error, 2, partial(all_reduce, reduced)),
            ("all-gather", gap, 1, partial(all_gather, gathered, shard)),
        )
        for name, wrong_by, ways, run in runs:
            speed = (
                ways * (world - 1) / world * number / best_seconds(run, device) / 1e9
                if world > 1
                else None
            )
            row = judge(
                f"{backend} {name}, {size}, {world} rank(s)",
                version,
                wrong_by,
                0.0,
                REMEDY,
                speed=speed,
                slowest=SLOWEST[backend] if size == "large" else 0.0,
                unit="GB/s",
            )
            row.note = row.note or (
                "no bandwidth: with one rank nothing crosses a link" if world == 1 else ""
            )
            yield row


def main() -> list[Row]:
    return on_ranks(check_collectives, dist.all_reduce, dist.all_gather_into_tensor)


if __name__ == "__main__":
    emit(guarded("collectives", main))
