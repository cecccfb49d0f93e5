"""4-bit NormalFloat: rounding, double quantisation and the matrix product, against plain torch.

In the field: a bitsandbytes without its native library falls back or dies at the first product, and
a weight that another version packed decodes to another weight. `codebook.py` has the 16 values,
`repacking.py` a trap of CPUs.
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
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
BLOCK, SCALE_BLOCK = 64, 256  # weights with one scale, scales with one scale


def check_rounding(
    version: str, quantize: Callable, dequantize: Callable, device: str
) -> Iterator[Row]:
    """A weight quantised and dequantised, in every storage type, then with quantised scales.

    The reference: blocks of 64 are scaled by their largest value, and each value goes to its
    nearest code.
    """
    torch.manual_seed(0)
    weight = torch.randn(512, 256, device=device)
    blocks = weight.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    code = plain_codebook().float().to(device)
    nearest = code[(blocks / scale).unsqueeze(-1).sub(code).abs().argmin(-1)]  # [blocks, 64]
    for storage in STORAGES:
        packed, state = quantize(weight, quant_type="nf4", quant_storage=storage)
        error = relative_error(dequantize(packed, state).view(-1, BLOCK), nearest * scale)
        what = f"nf4 rounding, stored as {str(storage).removeprefix('torch.')}"
        yield judge(what, version, error, 1e-5, REINSTALL)
    packed, state = quantize(weight, quant_type="nf4", compress_statistics=True)
    inner = state.state2  # 8-bit codes of (scale - mean), 256 to a block, and an fp32 scale a block
    inner_scale = inner.absmax.repeat_interleave(SCALE_BLOCK)[: len(scale)]
    restored = inner.code[state.absmax.long()] * inner_scale + state.offset
    weights = dequantize(packed, state).view(-1, BLOCK)
    weight_error = relative_error(weights, nearest * restored[:, None])
    scale_error = relative_error(restored, scale[:, 0])
    remedy = f"{REINSTALL}, or bnb_4bit_use_double_quant=False"
    error = max(weight_error, scale_error)
    yield judge("nf4 double quantisation", version, error, 1e-2, remedy)


def check_product(
    version: str, matmul: Callable, quantize: Callable, dequantize: Callable, device: str
) -> Iterator[Row]:
    """x W' and its gradient in bf16 through `matmul`, against the dequantised W in float64.

    A step of bf16 is 4e-3. The speed is against a product with the dequantised W.
    """
    torch.manual_seed(0)
    rows, size = (8192, 4096) if device == "cuda" else (256, 1024)
    weight = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    packed, state = quantize(weight, quant_type="nf4", compress_statistics=True)
    dense = dequantize(packed, state)
    x, upstream = (torch.randn(rows, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run_both_passes(product: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = product(leaf)
        return out, torch.autograd.grad(out, leaf, upstream.to(out))[0]

    four_bit = partial(matmul, B=packed.t(), quant_state=state)
    dense_product = partial(F.linear, weight=dense)
    wanted = x.double() @ dense.double().T, upstream.double() @ dense.double()
    error = max(map(relative_error, run_both_passes(four_bit), wanted))
    dense_seconds = best_seconds(partial(run_both_passes, dense_product), device)
    speed = dense_seconds / best_seconds(partial(run_both_passes, four_bit), device)
    what = "nf4 product and gradient"
    yield judge(what, version, error, 1e-2, REINSTALL, speed=speed, slowest=0.1)


def main() -> Iterator[Row]:
    import bitsandbytes as bnb

    version = bnb.__version__
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
    state = quantize(torch.randn(64, 64, device=device), quant_type="nf4")[1]
    yield from guarded("nf4 codebook", check_codebook, version, state.code)
    yield from guarded("nf4 rounding", check_rounding, version, quantize, dequantize, device)
    functions = bnb.matmul_4bit, quantize, dequantize
    yield from guarded("nf4 product", check_product, version, *functions, device)
    if device == "cpu":
        yield from guarded("Linear4bit on CPU", repacking.main, bnb)


if __name__ == "__main__":
    emit(guarded("nf4", main))
