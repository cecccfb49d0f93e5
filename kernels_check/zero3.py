"""Packed NF4 weights through ZeRO-3: sharded over the ranks and gathered they are the same bytes.

In the field: DeepSpeed casts every floating parameter by value, and packed NF4 is a code, not a
number. Stored as fp16 it comes back as another weight and nothing tells; bf16 and uint8 survive.
Gradients are added up in bf16 unless `grad_accum_dtype` and `communication_data_type` are fp32, and
bf16 forgets what is 256 times smaller than the sum (DeepSpeed#1800, #2768).
The precision that is checked is that of `ds_config.json`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kernels_check.ranks import on_ranks, zero3_config, zero3_engine
from kernels_check.rows import Row, guarded, judge
from kernels_check.table import emit


class Layers(torch.nn.Module):
    """A Linear4bit for each storage type, and one trained vector whose gradient is the input."""

    def __init__(self, storages: tuple[torch.dtype, ...], device: str) -> None:
        import bitsandbytes as bnb

        super().__init__()
        options = {"bias": False, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
        layers = [bnb.nn.Linear4bit(256, 128, quant_storage=s, **options) for s in storages]
        self.layers = torch.nn.ModuleList(layers).to(device)
        self.trained = torch.nn.Parameter(torch.zeros(512, dtype=torch.bfloat16, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.trained * x).sum()


def stored_bytes(layer: Any) -> torch.Tensor:
    """The packed codes of a Linear4bit as bytes, flat."""  # Any: its weight is more than a Tensor
    return layer.weight.data.view(torch.uint8).flatten()


def stored_state(layer: Any) -> dict[str, torch.Tensor]:
    """The scales and the like of a Linear4bit, by name."""
    return layer.weight.quant_state.as_dict(packed=True)


def partition_and_gather(
    device: str, storages: tuple[torch.dtype, ...], config: dict[str, Any]
) -> Iterator[Row]:
    """Rows for the bytes and quantisation states of each storage type, and for the gradient sum."""
    torch.manual_seed(0)
    model = Layers(storages, device)
    packed = [stored_bytes(layer).clone() for layer in model.layers]
    states = [
        {name: value.clone() for name, value in stored_state(layer).items()}
        for layer in model.layers
    ]
    # No zero.Init here, nor in the loop: it would skip the cast by value that `initialize` makes,
    # and with it the fault.
    engine = zero3_engine(model, config)
    for layer, storage, codes, state in zip(model.layers, storages, packed, states):
        yield check_gathered(layer, storage, codes, state)
    yield check_gradient_sum(engine, config["gradient_accumulation_steps"], device)


def check_gathered(
    layer: Any, storage: torch.dtype, packed: torch.Tensor, state: dict[str, torch.Tensor]
) -> Row:
    """A partitioned layer, gathered, against what it stored before. Every rank must call it.

    The error is the fraction of bytes that differ, plus the number of state tensors that do.
    """
    import deepspeed

    what = f"zero3 NF4 stored as {str(storage).removeprefix('torch.')}"
    if layer.weight.numel():
        raise RuntimeError(f"{what}: the weight was not partitioned, so nothing was checked")
    with deepspeed.zero.GatheredParameters([layer.weight]):
        gathered, gathered_state = stored_bytes(layer), stored_state(layer)
        if gathered.shape == packed.shape:
            changed = (gathered != packed).double().mean().item()
        else:
            changed = 1.0
        changed += sum(
            not torch.equal(gathered_state[name], value) for name, value in state.items()
        )
    remedy = "set bnb_4bit_quant_storage to bfloat16 or uint8; qwZ off"
    return judge(what, deepspeed.__version__, changed, 0.0, remedy)


def gradient_part(rank: int, micro_batch: int) -> float:
    """The gradient of each micro-batch: one large, and small ones that bf16 would drop."""
    if rank == micro_batch == 0:
        return 1.0
    return 2.0 ** -(9 + rank + 2 * micro_batch)


def check_gradient_sum(engine, micro_batches: int, device: str) -> Row:
    """The gradient of a step against the exact sum. Every rank must call it."""
    import deepspeed

    for i in range(micro_batches):
        engine.set_gradient_accumulation_boundary(i == micro_batches - 1)
        part = gradient_part(dist.get_rank(), i)
        x = torch.full((512,), part, dtype=torch.bfloat16, device=device)
        engine.backward(engine(x), scale_wrt_gas=False)
    trained = engine.module.get_parameter("trained")
    got = deepspeed.utils.safe_get_full_grad(trained).double()
    world_size = dist.get_world_size()
    parts = [gradient_part(rank, i) for rank in range(world_size) for i in range(micro_batches)]
    wanted = sum(parts) / world_size
    error = (got / wanted - 1).abs().max().item()
    remedy = (
        'ds_config.json: "data_types": {"grad_accum_dtype": "fp32"},'
        ' "communication_data_type": "fp32"'
    )
    return judge("zero3 gradients add up in fp32", deepspeed.__version__, error, 1e-6, remedy)


def main() -> list[Row]:
    return on_ranks(partition_and_gather, (torch.bfloat16, torch.uint8), zero3_config(2))


if __name__ == "__main__":
    emit(guarded("zero3", main))
