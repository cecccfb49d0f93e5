"""Packed NF4 weights through ZeRO-3: cut over the ranks and gathered again they must be the same bytes.

In the field: DeepSpeed casts every floating parameter by value, and packed NF4 is a code, not a number: stored as fp16 it comes
back as another weight without a word, bf16 and uint8 survive. Gradients are added up in bf16 unless `grad_accum_dtype` and
`communication_data_type` say fp32, and bf16 forgets what is 256 times smaller than the sum (DeepSpeed#1800, #2768).
The precision checked is that of `ds_config.json`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kernels_check.ranks import on_ranks, zero3_config, zero3_engine
from kernels_check.rows import Row, guarded, judge
from kernels_check.table import emit


def partition_and_gather(
    device: str, storages: tuple[torch.dtype, ...], config: dict[str, Any]
) -> Iterator[Row]:
    """A Linear4bit for each storage type in one model with one trained vector: bytes, quantisation states, gradient sum."""
    import bitsandbytes as bnb
    import deepspeed

    torch.manual_seed(0)
    options = {"bias": False, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
    layers: list[Any] = [
        bnb.nn.Linear4bit(256, 128, quant_storage=s, **options) for s in storages
    ]  # Any: their weights are more than Tensors
    model = torch.nn.ModuleList(layers).to(device)
    model.trained = torch.nn.Parameter(torch.zeros(512, dtype=torch.bfloat16, device=device))
    model.forward = lambda x: (
        model.get_parameter("trained") * x
    ).sum()  # so its gradient is x, exactly
    stored = [layer.weight.data.view(torch.uint8).flatten().clone() for layer in layers]
    states = [
        {k: v.clone() for k, v in layer.weight.quant_state.as_dict(packed=True).items()}
        for layer in layers
    ]

    # no zero.Init here, nor in the loop: it would skip the cast by value that `initialize` makes, and with it the fault
    engine = zero3_engine(model, config)
    for layer, storage, packed, state in zip(layers, storages, stored, states):
        what = f"zero3 NF4 stored as {str(storage)[6:]}"
        if layer.weight.numel():
            raise RuntimeError(f"{what}: the weight was not partitioned, so nothing was checked")
        with deepspeed.zero.GatheredParameters([layer.weight]):
            back, now = (
                layer.weight.data.view(torch.uint8).flatten(),
                layer.weight.quant_state.as_dict(packed=True),
            )
            changed = (back != packed).double().mean().item() if back.shape == packed.shape else 1.0
            changed += sum(not torch.equal(now[name], value) for name, value in state.items())
        yield judge(
            what,
            deepspeed.__version__,
            changed,
            0.0,
            "set bnb_4bit_quant_storage to bfloat16 or uint8; qwZ off",
        )

    ranks, count = dist.get_world_size(), config["gradient_accumulation_steps"]
    share = lambda rank, i: 1.0 if rank == i == 0 else 2.0 ** -(9 + rank + 2 * i)  # noqa: E731  bf16 would drop the small ones
    for i in range(count):
        engine.set_gradient_accumulation_boundary(i == count - 1)
        x = torch.full((512,), share(dist.get_rank(), i), dtype=torch.bfloat16, device=device)
        engine.backward(engine(x), scale_wrt_gas=False)
    got = deepspeed.utils.safe_get_full_grad(model.get_parameter("trained")).double()
    wanted = sum(share(rank, i) for rank in range(ranks) for i in range(count)) / ranks
    remedy = 'ds_config.json: "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"'
    yield judge(
        "zero3 gradients add up in fp32",
        deepspeed.__version__,
        (got / wanted - 1).abs().max().item(),
        1e-6,
        remedy,
    )


def main() -> list[Row]:
    return on_ranks(partition_and_gather, (torch.bfloat16, torch.uint8), zero3_config(2))


if __name__ == "__main__":
    emit(guarded("zero3", main))
