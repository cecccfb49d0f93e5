"""The loop's products with frozen weights in FP8 (loop/fp8/) against float64.

In the field: a scale along the wrong axis, or sums in fewer bits than fp32, train on, only worse.
The errors are of numbers whose size differs from token to token and from feature to feature, as
that of activations does.
"""

from collections.abc import Iterator

import torch

from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit
from loop.fp8 import products
from loop.fp8.admission import FP8_ROWS, REMEDY, missing_hardware
from loop.fp8.products import ERROR_BOUND, Quantized, product, quantize_rows

TOKENS, INPUTS, OUTPUTS = 8192, 4096, (4096, 1024, 1024)  # of queries, keys and values
TRITON_BOUND = 1e-3  # a quotient on the border between two codes may take the other one


def random_matrices(device: str, tokens: int) -> tuple[torch.Tensor, list, list]:
    """x [T, K], each W [N, K] and each dy [T, N], in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def uneven(*shape: int) -> torch.Tensor:
        sizes = randn(shape[0], 1) + randn(1, shape[1])
        return (randn(*shape) * sizes.exp()).bfloat16()

    x = uneven(tokens, INPUTS)
    weights = [(0.02 * randn(outputs, INPUTS)).bfloat16() for outputs in OUTPUTS]
    return x, weights, [uneven(tokens, outputs) for outputs in OUTPUTS]


def dequantized(rows: Quantized) -> torch.Tensor:
    """In float64."""
    return rows.codes.double() * rows.scales.double()


def check_rows(x: torch.Tensor, device: str) -> Iterator[Row]:
    """The kernel that quantises rows, against plain PyTorch; its speed is relative to that."""
    on_triton = products.on_triton
    products.on_triton = lambda x: False
    try:
        plain = quantize_rows(x)
        plain_seconds = best_seconds(lambda: quantize_rows(x), device)
    finally:
        products.on_triton = on_triton
    yield judge(
        "fp8 rows",
        f"torch {torch.__version__}",
        relative_error(dequantized(quantize_rows(x)), dequantized(plain)),
        TRITON_BOUND,
        REMEDY,
        speed=plain_seconds / best_seconds(lambda: quantize_rows(x), device),
        slowest=0.5,
    )


def check_products(device: str, tokens: int) -> Iterator[Row]:
    """Both products' errors; their speeds, the quantisation included, beside bf16's products."""
    x, weights, dys = random_matrices(device, tokens)
    yield from check_rows(x, device)
    for_outputs = quantize_rows(weights[0])
    for_inputs = quantize_rows(*[weight.t() for weight in weights])

    def forward() -> torch.Tensor:
        return product(quantize_rows(x), for_outputs, torch.bfloat16)

    def grad_input() -> torch.Tensor:
        return product(quantize_rows(*dys), for_inputs, torch.bfloat16)

    def grad_input_in_bf16() -> torch.Tensor:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)
        return dx

    exact = x.double() @ weights[0].double().t()
    exact_dx = sum(dy.double() @ weight.double() for dy, weight in zip(dys, weights))
    cases = (
        (forward, lambda: x @ weights[0].t(), exact),
        (grad_input, grad_input_in_bf16, exact_dx),
    )
    for what, (ours, in_bf16, wanted) in zip(FP8_ROWS, cases):
        yield judge(
            what,
            f"torch {torch.__version__}",
            relative_error(ours(), wanted),
            ERROR_BOUND,
            REMEDY,
            speed=best_seconds(in_bf16, device) / best_seconds(ours, device),
            slowest=1.0,
        )


def main() -> Iterator[Row]:
    if reason := missing_hardware():
        yield Row("fp8", "", "missing", note=f"compute=fp8 {reason}", required=False)
        return
    yield from guarded("fp8", check_products, "cuda", TOKENS, required=False)


if __name__ == "__main__":
    emit(guarded("fp8", main, required=False))
