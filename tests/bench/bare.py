"""What the loop is measured with: given examples, a clock, no DeepSpeed, one step profiled."""

from collections import Counter

import numpy as np
import torch

from loop.checkpoint.checkpointer import Checkpointer
from loop.data.dataset import TrainingData
from loop.data.report import DatasetReport
from loop.monitor.kernel_profile import milliseconds_by_kind
from loop.monitor.run_logger import RunLogger


def as_training_data(examples: list) -> TrainingData:
    """These examples to train on, and none to validate with."""
    return TrainingData(
        train=examples,
        valid=[],
        samples=[],
        lengths=np.array([len(e) for e in examples]),
        num_targets=np.array([e.num_targets for e in examples]),
        weights=None,
        reports={
            "train": DatasetReport(len(examples), len(examples), [], [], [], 0, False),
            "valid": DatasetReport(0, 0, [], [], [], 0, False),
        },
    )


def timed_logger(clock):
    """A RunLogger that tells `clock` the tokens of each step."""

    class TimedLogger(RunLogger):
        def log_step(self, state, result, lr, lengths, *rest) -> None:
            clock.step(int(lengths.sum()))
            super().log_step(state, result, lr, lengths, *rest)

    return TimedLogger


class NoCheckpoints(Checkpointer):
    """Writes none: a bare engine has no partitions to save."""

    def save(self, engine, state, logger) -> None:
        pass


class BareEngine:
    """What the loop asks of DeepSpeed's engine, in plain PyTorch on one device.

    Weights, gradients and AdamW are in bf16.
    """

    def __init__(self, model, optimizer, config) -> None:
        self.module = model
        self.optimizer = optimizer
        self.boundary = True  # the next micro-batch completes the step
        for p in model.parameters():
            p.ds_numel, p.ds_shape = p.numel(), p.shape

    def __call__(self, **inputs):
        return self.module(**inputs)

    def train(self) -> None:
        self.module.train()

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.boundary = boundary

    def backward(self, loss, scale_wrt_gas=False) -> None:
        loss.backward()
        if not self.boundary:  # a replayed layer's gradients are where its next replay writes
            for p in self.module.parameters():
                if p.grad is not None:
                    p.grad = p.grad.clone()

    def step(self) -> None:
        if self.boundary:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return True


def initialize(model, optimizer, config):
    """In the place of deepspeed.initialize."""
    return BareEngine(model, optimizer, config), optimizer, None, None


def use_plain_gradients(train) -> None:
    """Ours read and write ZeRO-3's slices, which a bare engine lacks."""
    train.invalidate_gradients = lambda *_: None
    train.clip_grad_norm = lambda parameters, max_norm: torch.nn.utils.clip_grad_norm_(
        parameters, max_norm
    ).double()


def profile_a_step(train, at: int, spec: dict) -> None:
    """Makes the loop profile its step `at`: ms by kind of kernel, and between the kernels.

    The result is in spec["profiled"] then.
    """
    train_step = train.train_step
    steps = 0

    def profiled(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps != at:
            return train_step(*args, **kwargs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            result = train_step(*args, **kwargs)
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kinds = milliseconds_by_kind(kernels)
        begin = min(e.time_range.start for e in kernels)
        span = (max(e.time_range.end for e in kernels) - begin) / 1e3
        slowest = Counter()
        for e in kernels:
            slowest[e.name[:90]] += e.self_device_time_total / 1e3
        spec["profiled"] = {
            "kernels": len(kernels),
            "kernel_ms": dict(kinds.most_common()),
            "span_ms": span,
            "between_kernels_ms": span - sum(kinds.values()),
            "slowest": slowest.most_common(25),
        }
        return result

    train.train_step = profiled
