"""The profiler behind `./launch.sh profile`: it records a few steps of a run and tabulates them.

`ProfilingLogger` takes the logger's place in the loop, so the loop runs as `train` runs it. The
first steps compile kernels and find allocations; they pass unrecorded. After the last recorded step
the logger ends the run by raising `ProfileFinished`, and `write_profile` writes a trace and a
table.
"""

import re
from collections import Counter
from collections.abc import Sequence
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
    ("LoRA with dropout", r"^lora_|^grad_lora_a|dropout|masked_scale|bernoulli|distribution"),
    ("SwiGLU, rotary, norms", r"^swiglu|^rotate_|rms|layer_norm|silu"),
    ("loss", r"softmax|nll"),
    ("AdamW, clipping", r"multi_tensor|Adam|norm_kernel|lpnorm|foreach"),
    ("copies", r"copy|Memcpy|Memset|fill|cat"),
    ("element by element", r"elementwise|vectorized|unrolled|add|mul"),
]

# Name, calls (None: they are not counted), milliseconds; of all recorded steps together.
TableRow = tuple[str, int | None, float]


def kernel_kind(kernel: str) -> str:
    """The kind of a GPU kernel by its name, "other" if no pattern is in it."""
    for kind, pattern in KINDS:
        if re.search(pattern, kernel):
            return kind
    return "other"


def milliseconds_by_kind(kernels: list) -> Counter[str]:
    """Milliseconds of the profiler's GPU events by kind of kernel."""
    milliseconds: Counter = Counter()
    for event in kernels:
        milliseconds[kernel_kind(event.name)] += event.self_device_time_total / 1e3
    return milliseconds


def busy_time(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of (start, end) intervals: kernels of several queues overlap."""
    total = 0.0
    covered_until = float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(end, covered_until)
    return total


class ProfileFinished(Exception):
    """The recorded steps are done. All ranks raise it after the same step.

    Its arguments are the profiler and the seconds of the phases of every step, see `StepTimer`.
    """


class TracedTimer(StepTimer):
    """A step timer whose steps and phases are ranges of the profiler's trace as well."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.steps: list[dict[str, float]] = []  # what `stop` returned
        self.open_ranges: list[record_function] = []  # the step, then its phase

    def start(self) -> None:
        self._open_range(f"step {len(self.steps) + 1}")
        super().start()

    def phase(self, name: str) -> None:
        if len(self.open_ranges) > 1:
            self._close_range()
        if name:
            self._open_range(name)
        super().phase(name)

    def stop(self) -> dict[str, float]:
        self.steps.append(super().stop())
        self._close_range()
        return self.steps[-1]

    def _open_range(self, name: str) -> None:
        self.open_ranges.append(record_function(name))
        self.open_ranges[-1].__enter__()

    def _close_range(self) -> None:
        self.open_ranges.pop().__exit__(None, None, None)


class ProfilingLogger(RunLogger):
    """A run's logger that records steps on rank 0 and then ends the run."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.timer: TracedTimer = TracedTimer(self.ranks.device)
        activities = [ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)

    def start_step(self, step: int) -> None:
        if self.on and len(self.timer.steps) == WARM_UP:
            self.profiler.start()
        super().start_step(step)

    def log_step(self, *args) -> None:
        super().log_step(*args)
        if len(self.timer.steps) == WARM_UP + STEPS:
            if self.on:
                self.profiler.stop()
            self.close({})
            dist.barrier()  # rank 0 takes its time
            raise ProfileFinished(self.profiler, self.timer.steps)


def profile_table(profiler, steps: list[dict[str, float]]) -> str:
    """Where the recorded steps' time went on rank 0, as text with ms a step.

    First by phase; then by kind of kernel on a GPU, by operator on a CPU. steps: the seconds of the
    phases of all steps, those before the recorded ones included.
    """
    recorded = steps[-STEPS:]
    step_ms = sum(sum(phases.values()) for phases in recorded) / STEPS * 1e3
    before_ms = sum(steps[WARM_UP - 1].values()) * 1e3
    lines = [
        f"a step on rank 0: {step_ms:,.1f} ms while it was recorded, "
        f"{before_ms:,.1f} ms before that"
    ]
    phase_rows = [(name, None, sum(phases[name] for phases in recorded) * 1e3) for name in PHASES]
    lines += format_table("part", phase_rows, step_ms)
    ranges = {*PHASES, *(f"step {i + 1}" for i in range(len(steps)))}
    kernels = _gpu_kernels(profiler, ranges)
    if kernels:
        lines += _kernel_tables(kernels, step_ms)
    else:
        lines += _operator_table(profiler, ranges, step_ms)
    return "\n".join(lines)


def _gpu_kernels(profiler, ranges: set[str]) -> list:
    """The profiler's events on the GPU without the ranges that lie around kernels."""
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e for e in events if not (e.name in ranges or getattr(e, "is_user_annotation", False))]


def _kernel_tables(kernels: list, step_ms: float) -> list[str]:
    """Time by kind of kernel, time without a kernel, and the 15 slowest kernels."""
    calls_of_kind = Counter(kernel_kind(e.name) for e in kernels)
    kinds = [
        (kind, calls_of_kind[kind], ms) for kind, ms in milliseconds_by_kind(kernels).most_common()
    ]

    working = [e for e in kernels if kernel_kind(e.name) != "communication"]
    any_ms = _busy_milliseconds(kernels)
    working_ms = _busy_milliseconds(working)
    idle = [
        ("nothing but communication runs", None, any_ms - working_ms),
        ("no kernel runs", None, STEPS * step_ms - any_ms),
    ]

    calls = Counter(e.name for e in kernels)
    milliseconds = Counter[str]()
    for e in kernels:
        milliseconds[e.name] += e.self_device_time_total / 1e3
    slowest = [(name, calls[name], ms) for name, ms in milliseconds.most_common(15)]

    return [
        *format_table("kind of kernel (several queues may overlap)", kinds, step_ms),
        *format_rows(idle, step_ms),
        *format_table("slowest kernels", slowest, step_ms),
    ]


def _busy_milliseconds(kernels: list) -> float:
    return busy_time([(e.time_range.start, e.time_range.end) for e in kernels]) / 1e3


def _operator_table(profiler, ranges: set[str], step_ms: float) -> list[str]:
    """Time of the 20 slowest operators on the CPU, and of all others together."""
    rows = []
    for event in sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total):
        name = event.key
        if name in ranges:
            name = f"outside of operators, in {name}: Python, waiting for other ranks"
        rows.append((name, event.count, event.self_cpu_time_total / 1e3))
    slowest = rows[:20]
    others = rows[20:]
    calls = sum(count for _, count, _ in others)
    others_ms = sum(ms for _, _, ms in others)
    slowest.append((f"{len(others)} others", calls, others_ms))
    return format_table("operator, without those that it calls", slowest, step_ms)


def format_table(title: str, rows: Sequence[TableRow], step_ms: float) -> list[str]:
    """The lines of a table under a title. step_ms: of one step, which is 100 %."""
    return ["", f"{title:84} {'a step':>9} {'ms':>9} {'share':>6}", *format_rows(rows, step_ms)]


def format_rows(rows: Sequence[TableRow], step_ms: float) -> list[str]:
    """A line a row: name, calls a step, ms a step, and its fraction of a step."""
    lines = []
    for name, count, total_ms in rows:
        calls = "" if count is None else f"{count / STEPS:,.0f}"
        ms = total_ms / STEPS
        lines.append(f"{name[:84]:84} {calls:>9} {ms:>9,.1f} {ms / step_ms:>6.1%}")
    return lines


def write_profile(folder: Path, profiler, steps: list[dict[str, float]]) -> str:
    """Writes trace.json and table.txt into `folder` and returns what to print.

    Neither holds a word of an example: operators and kernels have names, not values.
    """
    folder.parent.chmod(0o700)  # like any run's folder
    profiler.export_chrome_trace(str(folder / "trace.json"))
    table = profile_table(profiler, steps)
    (folder / "table.txt").write_text(table + "\n")
    return (
        f"\n{table}\n\nwritten to {folder}/trace.json (open it at https://ui.perfetto.dev, which "
        "reads it in the browser) and table.txt"
    )
