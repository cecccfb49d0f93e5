"""Decoder layers compiled one by one under ZeRO-3.

They must give the numbers of plain eager layers, with one compilation for all of them.
In the field: a guard that differs by layer (torchtune#1232; ZeRO-3's hooks, pytorch#115484)
recompiles until the limit and then runs eagerly, slower than without. Compiling the bound `forward`
of a leaf module keeps the hooks outside of the graph.
"""

import shutil
from collections.abc import Callable, Iterator

import torch
import torch._inductor.config

from kernels_check.ranks import on_ranks, zero3_config, zero3_engine
from kernels_check.rows import Row, best_seconds, guarded, judge, relative_error
from kernels_check.table import emit

# bf16: eager rounds after every operation, a fused kernel once, through three layers and back.
BOUND = 2e-2  # seen: 7e-3
WHAT = "compiled layer under ZeRO-3"


class Stack(torch.nn.Module):
    """Three small Llama layers in bf16, frozen as in QLoRA, and a trained vector."""

    def __init__(self, device: str) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        torch.manual_seed(0)
        hidden = 512 if device == "cuda" else 128
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
        layers = [LlamaDecoderLayer(config, index) for index in range(3)]
        self.layers = torch.nn.ModuleList(layers).requires_grad_(False)
        self.trained = torch.nn.Parameter(torch.ones(hidden))  # the optimizer needs one
        self.to(device, torch.bfloat16)
        self.x = torch.randn(1, 256, hidden, device=device, dtype=torch.bfloat16)
        rotary = LlamaRotaryEmbedding(config).to(device)
        self.position_embeddings = rotary(self.x, torch.arange(256, device=device)[None])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * self.trained
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=self.position_embeddings)
        return hidden


def run_both_passes(model: Callable, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient of the input)."""
    leaf = x.detach().requires_grad_()
    out = model(leaf)
    return out, torch.autograd.grad(out.float().square().mean(), leaf)[0]


def check_compiled(device: str, compile: Callable, config: dict) -> Iterator[Row]:
    """Output and input gradient under ZeRO-3 with compiled layers, against the plain stack.

    compile: as torch.compile, called with each layer's bound forward.
    """
    from deepspeed.utils import set_z3_leaf_modules
    from torch._dynamo.utils import counters

    # On a CPU scalar kernels: g++ takes half the time, and nobody trains on them.
    torch._inductor.config.cpp.simdlen = 1
    stack = Stack(device)
    plain = run_both_passes(stack, stack.x)
    set_z3_leaf_modules(stack, [type(stack.layers[0])])
    engine = zero3_engine(stack, config)
    eager_seconds = best_seconds(lambda: run_both_passes(engine, stack.x), device)
    torch._dynamo.reset()
    counters.clear()
    for layer in stack.layers:
        layer.forward = compile(layer.forward)
    error = max(map(relative_error, run_both_passes(engine, stack.x), plain))
    version = f"torch {torch.__version__}"
    recompilations = abs(counters["stats"]["unique_graphs"] - 1)
    compiled_seconds = best_seconds(lambda: run_both_passes(engine, stack.x), device)
    yield judge(
        WHAT,
        version,
        error,
        BOUND,
        "nothing to do: the loop does not compile its layers yet",
        speed=eager_seconds / compiled_seconds,
        slowest=0.8 if device == "cuda" else 0.0,
    )
    remedy = (
        'TORCH_LOGS=recompiles names the guard; "memory_efficient_linear": false in ds_config.json'
    )
    yield judge(f"{WHAT}, graphs beyond the first", version, recompilations, 0.0, remedy)


def main() -> Iterator[Row]:
    if any(map(shutil.which, ("g++", "clang++", "gcc"))):
        # One rank is enough: a guard fails on each rank by itself.
        yield from on_ranks(check_compiled, torch.compile, zero3_config(1), world_size=1)
    else:
        note = "torch.compile needs a C++ compiler on PATH, which only this check uses yet"
        yield Row(WHAT, "", "missing", note=note)


if __name__ == "__main__":
    emit(guarded(WHAT, main, required=False))
