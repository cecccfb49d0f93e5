"""On CPUs with AVX512-BF16 an evaluation repacks NF4 weights in place. Run by the nf4 check.

In the field: `Linear4bit.forward` does it in eval, after which gathered weights and gradients are wrong or gone
(bitsandbytes#2078 is one way); `support_avx512bf16_for_cpu = False` on each layer, as the loop sets it, prevents it.
"""

from collections.abc import Iterator
from types import ModuleType

import torch

from kernels_check.rows import Row, guarded, judge


def check_repacking(what: str, version: str, layer: torch.nn.Linear) -> Iterator[Row]:
    """`layer`, a Linear4bit on the CPU: its bytes and its input gradient before and after an evaluation.
    The error is absolute, and 1 where the bytes have changed."""

    def gradient() -> torch.Tensor:
        x = torch.ones(2, 4, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        layer.train()(x).sum().backward()
        return torch.full_like(x, torch.nan) if x.grad is None else x.grad

    before, stored = gradient(), layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.ones(2, 4, layer.in_features, dtype=torch.bfloat16))
    untouched = stored.shape == layer.weight.shape and torch.equal(
        stored.view(torch.uint8), layer.weight.data.view(torch.uint8)
    )
    error = (gradient() - before).abs().max().item() if untouched else 1.0
    yield judge(
        what,
        version,
        error,
        0.0,
        "eval repacks weights: set support_avx512bf16_for_cpu = False on each Linear4bit",
    )


def main(bnb: ModuleType) -> Iterator[Row]:
    """As shipped, which tells whether this machine is touched, and switched off, as the loop trains."""
    version = bnb.__version__
    for what, switch in (
        ("Linear4bit on CPU, as shipped", None),
        ("Linear4bit on CPU, repacking off", False),
    ):
        layer = bnb.nn.Linear4bit(
            256,
            128,
            bias=False,
            quant_type="nf4",
            compute_dtype=torch.bfloat16,
            quant_storage=torch.bfloat16,
        ).to("cpu")
        if switch is not None:
            layer.support_avx512bf16_for_cpu = switch
        yield from guarded(what, check_repacking, what, version, layer, required=switch is False)
