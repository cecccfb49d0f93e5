"""The optimizers that the loop may use against torch's plain AdamW (foreach=False).

Each takes ten steps on random gradients.
In the field: DeepSpeed's fused Adam needs a compiler and nvcc, so it is not used here. The 8-bit
states of bitsandbytes are noisier (arXiv 2110.02861), and paged ones crash where managed memory
does not work.
"""

from collections.abc import Callable, Iterator

import torch

from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
# Ten updates of 1e-3 on weights near 1, whose fp32 steps are 1e-7: plain AdamW itself is 6.5e-5
# from float64.
BOUND = 1e-4
EIGHT_BIT_BOUND = 0.05  # measured 0.013: 8 bits a moment
GPU_OPTIMIZERS = (
    ("AdamW8bit", EIGHT_BIT_BOUND),
    ("PagedAdamW", BOUND),
    ("PagedAdamW8bit", EIGHT_BIT_BOUND),
)


def plain_adamw(parameters, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=False, **settings)


def fused_adamw(parameters, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **settings)


def run_steps(
    make: Callable, device: str, count: int = 10
) -> tuple[torch.Tensor, Callable[[], object]]:
    """(how far `count` steps of `make([parameter], **SETTINGS)` move a parameter, a step to time).

    The movement is fp32 [512, 1024].
    """
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(512, 1024, generator=generator).to(device))
    start = parameter.detach().clone()
    optimizer = make([parameter], **SETTINGS)
    for _ in range(count):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
    return parameter.detach() - start, optimizer.step


def check_optimizer(
    name: str, version: str, make: Callable, bound: float, device: str
) -> Iterator[Row]:
    """How far the parameters have moved, against plain AdamW. The speed is that of one step."""
    wanted, plain_step = run_steps(plain_adamw, device)
    got, step = run_steps(make, device)
    speed = best_seconds(plain_step, device) / best_seconds(step, device)
    yield judge(
        f"optimizer {name}",
        version,
        relative_error(got, wanted),
        bound,
        "set optimizer=plain",
        speed=speed,
        slowest=0.2,
    )


def main() -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = "AdamW fused", f"torch {torch.__version__}", fused_adamw, BOUND, device
    yield from guarded("optimizer AdamW fused", check_optimizer, *arguments)
    for name, bound in GPU_OPTIMIZERS:
        what = f"optimizer {name}"
        if device == "cpu":
            note = "meant for an NVIDIA GPU, whose memory it saves"
            yield Row(what, "", "missing", note=note, required=False)
            continue
        import bitsandbytes as bnb

        arguments = name, bnb.__version__, getattr(bnb.optim, name), bound, device
        yield from guarded(what, check_optimizer, *arguments, required=False)


if __name__ == "__main__":
    emit(guarded("optimizer", main))
