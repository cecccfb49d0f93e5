"""How long the parts of a step take, without slowing the step down.

A GPU works on after a launch has returned, so a wall clock around a launch measures Python. On a GPU a mark is therefore a CUDA event, put
into the same queue as the kernels; events are read at the step's end, where the loop has waited for the GPU anyway (`ranks.any`), so
marking adds no wait. On a CPU a mark is the clock. The parts follow each other without gap, so they add up to the step.

What can't be told apart this way: ZeRO-3 fetches weights and sends gradients while it computes, on a queue of its own. That lies inside
forward, backward and optimizer, and only where they wait for it; `./launch.sh profile` shows its kernels.
"""

import time
from typing import Any

import torch

PHASES = {
    "data": "reading, cutting and packing this rank's micro-batches, on the CPU",
    "forward": "a micro-batch to the device, its dropout, the model, the loss",
    "backward": "gradients, and with several ranks what is left of adding them up",
    "optimizer": "norm and clipping, loss over all ranks, AdamW, the new weights",
    "agreement": "whether a rank was asked to stop; who is early waits here for the others",
}


class StepTimer:
    """`start`, then `mark(part)` wherever another part begins, then `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[
            tuple[str, Any]
        ] = []  # a part and when it began: seconds, on a GPU an event

    def start(self) -> None:
        self.marks = []
        self.phase("data")

    def phase(self, part: str) -> None:
        """From here on the step's time is that of `part`, one of PARTS; a part may come again."""
        self.marks.append((part, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`. Call it where the GPU has nothing left to do, else it waits."""
        self.phase("")
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (part, begin), (_, end) in zip(self.marks, self.marks[1:]):
            seconds[part] += begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
        return seconds

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
