"""`./launch.sh profile`: where a step's time goes. A trace of three steps for Perfetto (https://ui.perfetto.dev) and a table.

The loop runs as `train` runs it, on as many ranks; only what sees its steps is another. The first steps compile kernels and find
allocations, so they pass unrecorded; after the third recorded one the run ends, and nothing is evaluated or saved.
"""

import re
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from .run_logger import RunLogger
from .step_timer import PHASES, StepTimer

WARM_UP, STEPS = 3, 3
KINDS = [  # of GPU kernels: the first pattern that is in the name
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK"),
    ("NF4", r"dequant|Dequant|kDequantize"),
    ("LoRA with dropout", r"^_down|^_grad_down|^_up|dropout|masked_scale|bernoulli|distribution"),
    ("SwiGLU, rotary, norms", r"^_swiglu|^_rotate|rms|layer_norm|silu"),
    ("loss", r"softmax|nll"),
    ("AdamW, clipping", r"multi_tensor|Adam|norm_kernel|lpnorm|foreach"),
    ("copies", r"copy|Memcpy|Memset|fill|cat"),
    ("element by element", r"elementwise|vectorized|unrolled|add|mul"),
]


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def by_kind(kernels: list) -> Counter:
    """Milliseconds of the profiler's GPU events by kind."""
    kinds: Counter = Counter()
    for e in kernels:
        kinds[kind_of(e.name)] += e.self_device_time_total / 1e3
    return kinds


def busy(intervals: list[tuple[float, float]]) -> float:
    """How long at least one of them was running: kernels of several queues overlap."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total, end = total + max(0.0, b - max(a, end)), max(b, end)
    return total


class Finished(Exception):
    """The recorded steps are done; all ranks raise it after the same one. Its arguments: the profiler, the parts of all steps."""


class TracedTimer(StepTimer):
    """Its steps and parts are ranges of the trace as well."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.steps: list[dict[str, float]] = []  # what `stop` gave
        self.ranges: list[record_function] = []

    def start(self) -> None:
        self._open(f"step {len(self.steps) + 1}")
        super().start()

    def phase(self, part: str) -> None:
        if len(self.ranges) > 1:
            self.ranges.pop().__exit__(None, None, None)
        if part:
            self._open(part)
        super().phase(part)

    def stop(self) -> dict[str, float]:
        self.steps.append(super().stop())
        self.ranges.pop().__exit__(None, None, None)
        return self.steps[-1]

    def _open(self, name: str) -> None:
        self.ranges.append(record_function(name))
        self.ranges[-1].__enter__()


class ProfilingLogger(RunLogger):
    """A run's monitor that records steps on rank 0 and then ends the run."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.timer: TracedTimer = TracedTimer(self.ranks.device)
        gpu = self.ranks.device.type == "cuda"
        self.profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
        )

    def start_step(self) -> None:
        if self.on and len(self.timer.steps) == WARM_UP:
            self.profiler.start()
        super().start_step()

    def step(self, *args) -> None:
        super().step(*args)
        if len(self.timer.steps) == WARM_UP + STEPS:
            if self.on:
                self.profiler.stop()
                self.close({})
            dist.barrier()  # rank 0 takes its time
            raise Finished(self.profiler, self.timer.steps)


def table(profiler, steps: list[dict[str, float]]) -> str:
    """Where the recorded steps' time went, in ms a step: by part; then by kind of kernel on a GPU, by operator on a CPU."""
    recorded = steps[-STEPS:]
    whole = sum(sum(parts.values()) for parts in recorded) / STEPS * 1e3
    lines = [
        f"a step on rank 0: {whole:,.1f} ms while it was recorded, {sum(steps[WARM_UP - 1].values()) * 1e3:,.1f} ms before that"
    ]
    lines += rows(
        "part",
        [(part, None, sum(parts[part] for parts in recorded) * 1e3) for part in PHASES],
        whole,
    )
    ranges = {*PHASES, *(f"step {i + 1}" for i in range(len(steps)))}
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [
        e for e in events if not (e.name in ranges or getattr(e, "is_user_annotation", False))
    ]  # ranges lie around kernels
    if kernels:
        kinds, counts, names, calls = (
            by_kind(kernels),
            Counter(kind_of(e.name) for e in kernels),
            Counter[str](),
            Counter(e.name for e in kernels),
        )
        for e in kernels:
            names[e.name] += e.self_device_time_total / 1e3
        spans = [(e.time_range.start, e.time_range.end) for e in kernels]
        others = [span for e, span in zip(kernels, spans) if kind_of(e.name) != "communication"]
        some, work = busy(spans) / 1e3, busy(others) / 1e3
        lines += rows(
            "kind of kernel (several queues may overlap)",
            [(k, counts[k], ms) for k, ms in kinds.most_common()],
            whole,
        )
        lines += rows(
            "",
            [
                ("nothing but communication runs", None, some - work),
                ("no kernel runs", None, STEPS * whole - some),
            ],
            whole,
        )[2:]
        lines += rows(
            "slowest kernels",
            [(name, calls[name], ms) for name, ms in names.most_common(15)],
            whole,
        )
    else:
        found = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
        named = [
            (
                f"outside of operators, in {e.key}: Python, waiting for other ranks"
                if e.key in ranges
                else e.key,
                e.count,
                e.self_cpu_time_total / 1e3,
            )
            for e in found
        ]
        rest = (
            f"{len(named[20:])} others",
            sum(count for _, count, _ in named[20:]),
            sum(ms for _, _, ms in named[20:]),
        )
        lines += rows("operator, without those that it calls", [*named[:20], rest], whole)
    return "\n".join(lines)


def rows(title: str, found: list[tuple[str, int | None, float]], whole: float) -> list[str]:
    """Lines of a table under a title. found: (name, how often or None, ms), both of all recorded steps; whole: ms of one step."""
    lines = ["", f"{title:84} {'a step':>9} {'ms':>9} {'share':>6}"]
    for name, count, ms in found:
        lines.append(
            f"{name[:84]:84} {'' if count is None else f'{count / STEPS:,.0f}':>9} {ms / STEPS:>9,.1f} {ms / STEPS / whole:>6.1%}"
        )
    return lines


def write(folder: Path, profiler, steps: list[dict[str, float]]) -> str:
    """Writes trace and table, and returns what to say. Neither holds a word of an example: operators and kernels have names, not values."""
    folder.parent.chmod(0o700)  # like any run's folder
    profiler.export_chrome_trace(str(folder / "trace.json"))
    text = table(profiler, steps)
    (folder / "table.txt").write_text(text + "\n")
    return f"\n{text}\n\nwritten to {folder}/trace.json (open it at https://ui.perfetto.dev, which reads it in the browser) and table.txt"
