"""Decoder layers compiled one by one under ZeRO-3: the numbers of plain eager layers, one compilation for all of them.

In the field: a guard that differs by layer (torchtune#1232; ZeRO-3's hooks, pytorch#115484) recompiles until the limit, then runs
eager, slower than without. Compiling the bound `forward` of a leaf module keeps the hooks outside the graph.
"""

import shutil
from collections.abc import Callable, Iterator

import torch
import torch._inductor.config

from kernels_check.ranks import on_ranks, zero3_config, zero3_engine
from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit

BOUND = 2e-2  # bf16: eager rounds after every operation, a fused kernel once, through three layers and back; seen 7e-3
WHAT = "compiled layer under ZeRO-3"


class Stack(
    torch.nn.Module
):  # three small Llama layers in bf16, frozen as in QLoRA, and a trained vector for the optimizer
    def __init__(self, device: str) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        torch.manual_seed(0)
        hidden = 512 if device == "cuda" else 128
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config = LlamaConfig(**sizes, attn_implementation="sdpa")
        self.layers = torch.nn.ModuleList(
            [LlamaDecoderLayer(config, index) for index in range(3)]
        ).requires_grad_(False)
        self.trained = torch.nn.Parameter(torch.ones(hidden))
        self.to(device, torch.bfloat16)
        self.x = torch.randn(1, 256, hidden, device=device, dtype=torch.bfloat16)
        self.rotary = LlamaRotaryEmbedding(config).to(device)(
            self.x, torch.arange(256, device=device)[None]
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * self.trained
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=self.rotary)
        return hidden


def check_compiled(device: str, compile: Callable, config: dict) -> Iterator[Row]:
    """Forward and input gradient of the plain stack, and under ZeRO-3 after `layer.forward = compile(layer.forward)`."""
    from deepspeed.utils import set_z3_leaf_modules
    from torch._dynamo.utils import counters

    torch._inductor.config.cpp.simdlen = (
        1  # on a CPU, scalar kernels: g++ takes half the time, and nobody trains on them
    )
    stack = Stack(device)

    def passes(run: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        out = run(leaf := stack.x.detach().requires_grad_())
        return out, torch.autograd.grad(out.float().square().mean(), leaf)[0]

    plain = passes(stack)
    set_z3_leaf_modules(stack, [type(stack.layers[0])])
    engine = zero3_engine(stack, config)
    eager_seconds = best_seconds(lambda: passes(engine), device)
    torch._dynamo.reset()
    counters.clear()
    for layer in stack.layers:
        layer.forward = compile(layer.forward)
    error = max(map(relative_error, passes(engine), plain))
    version, recompiled = f"torch {torch.__version__}", abs(counters["stats"]["unique_graphs"] - 1)
    speed, slowest = (
        eager_seconds / best_seconds(lambda: passes(engine), device),
        0.8 if device == "cuda" else 0.0,
    )
    yield judge(
        WHAT,
        version,
        error,
        BOUND,
        "nothing to do: the loop does not compile its layers yet",
        speed=speed,
        slowest=slowest,
    )
    remedy = (
        'TORCH_LOGS=recompiles names the guard; "memory_efficient_linear": false in ds_config.json'
    )
    yield judge(f"{WHAT}, graphs beyond the first", version, recompiled, 0.0, remedy)


def main() -> Iterator[Row]:
    if any(map(shutil.which, ("g++", "clang++", "gcc"))):
        yield from on_ranks(
            check_compiled, torch.compile, zero3_config(1), world_size=1
        )  # a guard is a rank's own affair
    else:
        yield Row(
            WHAT,
            "",
            "missing",
            note="torch.compile needs a C++ compiler on PATH, which only this check uses yet",
        )


if __name__ == "__main__":
    emit(guarded(WHAT, main, required=False))
