"""4-bit NormalFloat: rounding, double quantisation and the matrix product, against plain torch.

In the field: a bitsandbytes without its native library falls back or dies at the first product, and a weight that another
version packed decodes to another weight. `codebook.py` has the 16 values, `repacking.py` the CPU's own trap.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kernels_check import repacking
from kernels_check.codebook import check_codebook, plain_codebook
from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit

REINSTALL = "reinstall bitsandbytes at the pin"


def check_rounding(
    version: str, quantize: Callable, dequantize: Callable, device: str
) -> Iterator[Row]:
    """Blocks of 64 scaled by their largest value, each value to its nearest code; in every storage type, then with quantised scales."""
    torch.manual_seed(0)
    weight = torch.randn(512, 256, device=device)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    code = plain_codebook().float().to(device)
    nearest = code[(blocks / scale).unsqueeze(-1).sub(code).abs().argmin(-1)]  # [blocks, 64]
    for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        packed, state = quantize(weight, quant_type="nf4", quant_storage=storage)
        error = relative_error(dequantize(packed, state).view(-1, 64), nearest * scale)
        yield judge(f"nf4 rounding, stored as {str(storage)[6:]}", version, error, 1e-5, REINSTALL)
    packed, state = quantize(weight, quant_type="nf4", compress_statistics=True)
    inner = state.state2  # 8-bit codes of (scale - mean), 256 to a block, and an fp32 scale a block
    restored = (
        inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: len(scale)]
        + state.offset
    )
    decoded = relative_error(dequantize(packed, state).view(-1, 64), nearest * restored[:, None])
    error = max(decoded, relative_error(restored, scale[:, 0]))
    yield judge(
        "nf4 double quantisation",
        version,
        error,
        1e-2,
        REINSTALL + ", or bnb_4bit_use_double_quant=False",
    )


def check_product(
    version: str, matmul: Callable, quantize: Callable, dequantize: Callable, device: str
) -> Iterator[Row]:
    """x W' and its gradient in bf16 through `matmul`, against the dequantised W in float64. A step of bf16 is 4e-3."""
    torch.manual_seed(0)
    rows, size = (8192, 4096) if device == "cuda" else (256, 1024)
    packed, state = quantize(
        torch.randn(size, size, device=device, dtype=torch.bfloat16),
        quant_type="nf4",
        compress_statistics=True,
    )
    dense = dequantize(packed, state)
    x, upstream = (torch.randn(rows, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def passes(product: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        out = product(leaf := x.detach().requires_grad_())
        return out, torch.autograd.grad(out, leaf, upstream.to(out))[0]

    four_bit, dense_16 = (
        partial(matmul, B=packed.t(), quant_state=state),
        partial(F.linear, weight=dense),
    )
    wanted = x.double() @ dense.double().T, upstream.double() @ dense.double()
    error = max(map(relative_error, passes(four_bit), wanted))
    plain, ours = (
        best_seconds(partial(passes, product), device) for product in (dense_16, four_bit)
    )
    yield judge(
        "nf4 product and gradient", version, error, 1e-2, REINSTALL, speed=plain / ours, slowest=0.1
    )


def main() -> Iterator[Row]:
    import bitsandbytes as bnb

    version, device = bnb.__version__, "cuda" if torch.cuda.is_available() else "cpu"
    quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
    state = quantize(torch.randn(64, 64, device=device), quant_type="nf4")[1]
    yield from guarded("nf4 codebook", check_codebook, version, state.code)
    yield from guarded("nf4 rounding", check_rounding, version, quantize, dequantize, device)
    yield from guarded(
        "nf4 product", check_product, version, bnb.matmul_4bit, quantize, dequantize, device
    )
    if device == "cpu":
        yield from guarded("Linear4bit on CPU", repacking.main, bnb)


if __name__ == "__main__":
    emit(guarded("nf4", main))
