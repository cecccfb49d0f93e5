"""How long the phases of a step take, measured without slowing the step down.

A GPU works on after a launch has returned, so a wall clock around a launch measures Python. On a
GPU the timer therefore records CUDA events in the queue of the kernels. It reads them at the step's
end, where the loop has waited for the GPU anyway (`ranks.any`), so it adds no wait. On a CPU it
reads the clock. The phases follow each other without a gap, so they add up to the step.

ZeRO-3 gathers weights and reduces gradients on a queue of its own while the GPU computes. That time
is inside forward, backward and optimizer, and only where they wait for it; the timer can't tell it
apart. `./launch.sh profile` shows its kernels.
"""

import time
from typing import Any

import torch

PHASES = {
    "data": "reading, splitting and packing this rank's micro-batches, on the CPU",
    "forward": "a micro-batch to the device, its dropout, the model, the loss",
    "backward": "gradients, and with several ranks the rest of reducing them",
    "optimizer": "norm and clipping, loss over all ranks, AdamW, the new weights",
    "sync": "whether a rank was asked to stop; a rank that is early waits here for the others",
}


class StepTimer:
    """Call `start`, then `phase(name)` wherever another phase begins, then `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.begins: list[tuple[str, Any]] = []  # a phase, and a CUDA event or seconds of the clock

    def start(self) -> None:
        self.begins = []
        self.phase("data")

    def phase(self, name: str) -> None:
        """Counts the step's time from here on as `name`, one of PHASES. A phase may come again."""
        self.begins.append((name, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds of each phase since `start`.

        Call it where the GPU has nothing left to do; elsewhere it waits for the GPU.
        """
        self.phase("")
        if self.on_gpu:
            self.begins[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, begin), (_, end) in zip(self.begins, self.begins[1:]):
            seconds[name] += self._seconds_between(begin, end)
        return seconds

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_between(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
