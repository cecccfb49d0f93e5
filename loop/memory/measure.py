"""The memory that the steps of a run really took, to print beside the estimate."""

import contextlib
import re
from pathlib import Path

import psutil
import torch

from .estimate import peak_bytes

# What helps a run whose GPU is full.
TAKE_LESS = (
    "set micro_batch_size lower or gradient_checkpointing=true; ./launch.sh plan says what fits"
)


class GraphPools:
    """The memory of this process's CUDA graphs that torch's own statistics miss.

    After the capture, torch counts what a graph's kernels write as freed. It stays the graph's all
    the same, and `torch.cuda.max_memory_allocated` does not see it.
    """

    def __init__(self) -> None:
        self.uncounted_bytes = 0

    def update(self) -> None:
        """To be called after CUDA graphs were captured or released. Takes a memory snapshot."""
        self.uncounted_bytes = 0
        if torch.cuda.is_available():
            for segment in torch.cuda.memory_snapshot():
                if tuple(segment["segment_pool_id"]) != (0, 0):
                    self.uncounted_bytes += segment["total_size"] - segment["allocated_size"]


graph_pools = GraphPools()  # the allocator is the process's, and so are the pools


def peak_gpu_bytes() -> int:
    """Bytes of this GPU that tensors took at most since the last reset, CUDA graphs included."""
    return torch.cuda.max_memory_allocated() + graph_pools.uncounted_bytes


def describe_full_gpu(remedy: str = TAKE_LESS) -> str:
    """Who holds this GPU's memory, after a torch.OutOfMemoryError, and what to do: one line."""
    free, total = torch.cuda.mem_get_info()
    mine = torch.cuda.memory_reserved()
    others = max(0, total - free - mine)
    return (
        f"the memory of GPU {torch.cuda.current_device()} is full: of {total / 2**30:.1f} GiB this "
        f"process holds {mine / 2**30:.1f}, others and CUDA {others / 2**30:.1f} (nvidia-smi names "
        f"them). End those, or {remedy}"
    )


class PeakMemory:
    """The highest memory of the steps.

    On a GPU: bytes of tensors. On a CPU: the rise of this process's RSS since this object was made,
    which includes all that Python allocates, and what was freed but not handed back.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.rss_before = psutil.Process().memory_info().rss

    def begin(self) -> None:
        """Forgets the peak of loading and evaluating."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # Linux resets a process's own peak on request
                Path("/proc/self/clear_refs").write_text("5")

    def describe_beside(self, parts: dict[str, int]) -> str:
        """One line with the predicted and the measured peak; parts: of `estimate_memory`."""
        if self.on_gpu:
            measured = peak_gpu_bytes()
            what = "allocated on this GPU"
        else:
            measured = peak_rss() - self.rss_before
            what = (
                "by which this process's RSS rose (a CPU: with Python's own memory, and what was "
                "freed but kept)"
            )
        return (
            f"memory      predicted {peak_bytes(parts) / 2**30:.2f} GiB at the peak; "
            f"measured {measured / 2**30:.2f} GiB {what}"
        )


def peak_rss() -> int:
    """Bytes of this process's highest RSS, or of the current one where Linux does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return psutil.Process().memory_info().rss
