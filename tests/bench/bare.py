"""Changes to the loop for measuring it: examples that come from nowhere, DeepSpeed taken out, one step under the profiler."""

from collections import Counter

import torch

from loop.data.report import DatasetReport
from loop.monitor.kernel_profile import by_kind


def given_examples(examples: list):
    """In the place of loop.data.dataset.load_examples: these to train on, none held out."""

    def load(config, tokenizer, split):
        found = examples if split == "train" else []
        return found, DatasetReport(len(found), len(found), [], [], [], 0, False)

    return load


class BareEngine:
    """What the loop asks of DeepSpeed's engine, by plain PyTorch on one device: weights, gradients and AdamW in bf16."""

    def __init__(self, model, optimizer, config) -> None:
        self.module, self.optimizer, self.boundary = model, optimizer, True
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
        if not self.boundary:  # a replayed layer's gradients lie where its next replay writes
            for p in self.module.parameters():
                p.grad = None if p.grad is None else p.grad.clone()

    def step(self) -> None:
        if self.boundary:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return True


def take_deepspeed_out(train) -> None:
    def initialize(model, optimizer, config):
        return BareEngine(model, optimizer, config), optimizer, None, None

    train.deepspeed.initialize = initialize
    train.spoil = lambda *_: None  # it writes into ZeRO-3's slices
    train.clip_grad_norm = lambda parameters, max_norm: torch.nn.utils.clip_grad_norm_(
        parameters, max_norm
    ).double()


def profile_a_step(train, at: int, spec: dict) -> None:
    """Where a step's time goes on the GPU, in ms by kind of kernel, and what lies between the kernels."""
    step_of, count = train.train_step, [0]

    def profiled(*args, **kwargs):
        count[0] += 1
        if count[0] != at:
            return step_of(*args, **kwargs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            result = step_of(*args, **kwargs)
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kinds = by_kind(kernels)
        span = (
            max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
        ) / 1e3
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
