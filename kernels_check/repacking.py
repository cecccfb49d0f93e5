"""On CPUs with AVX512-BF16 an evaluation repacks NF4 weights in place. The nf4 check runs it.

In the field: `Linear4bit.forward` does it in eval, after which gathered weights and gradients are
wrong or gone (bitsandbytes#2078 is one way). `support_avx512bf16_for_cpu = False` on each layer, as
the loop sets it, prevents it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from kernels_check.rows import Row, guarded, judge


def check_repacking(what: str, version: str, layer: torch.nn.Linear) -> Iterator[Row]:
    """The bytes and the input gradient of `layer` before and after an evaluation.

    `layer` is a Linear4bit on the CPU. The error is absolute, and 1 where the bytes have changed.
    """

    def gradient() -> torch.Tensor:
        x = torch.ones(2, 4, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        layer.train()(x).sum().backward()
        return torch.full_like(x, torch.nan) if x.grad is None else x.grad

    before = gradient()
    stored = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.ones(2, 4, layer.in_features, dtype=torch.bfloat16))
    untouched = stored.shape == layer.weight.shape and torch.equal(
        stored.view(torch.uint8), layer.weight.data.view(torch.uint8)
    )
    error = (gradient() - before).abs().max().item() if untouched else 1.0
    remedy = "eval repacks weights: set support_avx512bf16_for_cpu = False on each Linear4bit"
    yield judge(what, version, error, 0.0, remedy)


def linear4bit(bnb: ModuleType) -> Any:
    """A quantised layer on the CPU."""
    layer = bnb.nn.Linear4bit(
        256,
        128,
        bias=False,
        quant_type="nf4",
        compute_dtype=torch.bfloat16,
        quant_storage=torch.bfloat16,
    )
    return layer.to("cpu")


def main(bnb: ModuleType) -> Iterator[Row]:
    """As shipped, which tells whether this CPU repacks, and switched off, as the loop trains."""
    what = "Linear4bit on CPU, as shipped"
    layer = linear4bit(bnb)
    yield from guarded(what, check_repacking, what, bnb.__version__, layer, required=False)
    what = "Linear4bit on CPU, repacking off"
    layer = linear4bit(bnb)
    layer.support_avx512bf16_for_cpu = False
    yield from guarded(what, check_repacking, what, bnb.__version__, layer)
