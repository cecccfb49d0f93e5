"""What the machine can do at all: bf16 matrix rate and memory bandwidth, on random data.

In the field: a GPU that is power-capped, shared or throttled trains at half its speed and nothing
tells. Zeros as data draw less power and flatter the rate by a fifth. The MFU and the plan for a run
need these rates, not those of the data sheet.
"""

from collections.abc import Callable, Iterator

import torch

from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit


def check_matrix_rate(device: str, matmul: Callable = torch.mm) -> Iterator[Row]:
    """TFLOP/s of a square bf16 product; its error is against fp32.

    "slow" where bf16 has less than half the rate of fp32: it is emulated.
    """
    size = 8192 if device == "cuda" else 1024
    flops = 2 * size**3
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    error = relative_error(matmul(a16, b16), a16.float() @ b16.float())
    bf16_rate = flops / best_seconds(lambda: matmul(a16, b16), device) / 1e12
    fp32_rate = flops / best_seconds(lambda: a @ b, device) / 1e12
    yield judge(
        "bf16 matrix product",
        f"fp32 {fp32_rate:.3g} TFLOP/s",
        error,
        1e-2,
        "bf16 is emulated or throttled here",
        speed=bf16_rate,
        slowest=fp32_rate / 2,
        unit="TFLOP/s",
    )


def check_bandwidth(device: str, copy: Callable = torch.Tensor.copy_) -> Iterator[Row]:
    """GB/s of a copy, where reading and writing both count.

    The error is the fraction of elements that did not arrive.
    """
    num_bytes = 1 << 30 if device == "cuda" else 1 << 27
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy(target, source)
    lost = (target != source).double().mean().item()
    rate = 2 * source.nbytes / best_seconds(lambda: copy(target, source), device) / 1e9
    yield judge(
        "memory copy",
        "",
        lost,
        0.0,
        "memory errors: don't train on this machine",
        speed=rate,
        unit="GB/s",
    )


def main() -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield from guarded("bf16 matrix product", check_matrix_rate, device)
    yield from guarded("memory copy", check_bandwidth, device)


if __name__ == "__main__":
    emit(guarded("ceilings", main, required=False))
