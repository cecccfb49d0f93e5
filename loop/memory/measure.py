"""The memory that the steps really took, to stand beside what the ledger said."""

import contextlib
import re
from pathlib import Path

import psutil
import torch

from .estimate import peak_bytes

_in_graphs = 0


def count_graphs() -> None:
    """To be called when CUDA graphs were recorded or let go. What their kernels write is freed in torch's eyes after the recording, and yet stays
    theirs: memory that `torch.cuda.max_memory_allocated` no longer sees."""
    global _in_graphs
    pools = (
        [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
        if torch.cuda.is_available()
        else []
    )
    _in_graphs = sum(s["total_size"] - s["allocated_size"] for s in pools)


def peak_gpu_bytes() -> int:
    """Bytes of this GPU that tensors took at most since the last reset, those of CUDA graphs included."""
    return torch.cuda.max_memory_allocated() + _in_graphs


class PeakMemory:
    """The highest memory of the steps. On a CPU it is the rise of this process's RSS since this object was made: tensors, and with them all
    that Python allocates, and what was freed but not handed back."""

    def __init__(self, device: torch.device) -> None:
        self.gpu, self.before = device.type == "cuda", psutil.Process().memory_info().rss

    def begin(self) -> None:
        """Forgets the peak of loading and evaluating; Linux forgets a process's own where it is asked to."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def beside(self, parts: dict[str, int]) -> str:
        """One line: predicted and measured. parts: a ledger."""
        if self.gpu:
            seen, what = peak_gpu_bytes(), "allocated on this GPU"
        else:
            high = psutil.Process().memory_info().rss
            with contextlib.suppress(OSError):
                if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                    high = int(found[1]) * 1024
            seen, what = (
                high - self.before,
                "by which this process's RSS rose (a CPU: with Python's own memory, and what was freed but kept)",
            )
        return f"memory      predicted {peak_bytes(parts) / 2**30:.2f} GiB at the peak; measured {seen / 2**30:.2f} GiB {what}"
