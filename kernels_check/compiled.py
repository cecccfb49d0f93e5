"""Decoder layers compiled one by one: the numbers of eager, one compilation for all layers.

In the field: a guard that differs from layer to layer (a checkpoint wrapper in torchtune#1232, ZeRO-3's hooks in
pytorch#115484) recompiles until the limit and then runs eager, and the run is slower than without. Compiling the bound
`forward` keeps DeepSpeed's hooks outside the graph.
"""

import shutil
from collections.abc import Callable, Iterator

import torch
import torch._inductor.config

from kernels_check.rows import Row, emit, guarded, judge, median_seconds, relative_error

BOUND = 2e-2  # bf16: eager rounds after every operation, a fused kernel once, through three layers and back; seen 7e-3


def llama_layers(device: str) -> tuple[list[torch.nn.Module], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Three small Llama decoder layers in bf16, the rotary cosines and sines, an input [1, T, hidden]."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes = {"hidden_size": 512, "intermediate_size": 1024} if device == "cuda" else {"hidden_size": 128, "intermediate_size": 256}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, attn_implementation="sdpa", **sizes)
    torch.manual_seed(0)
    layers = [LlamaDecoderLayer(config, index).to(device, torch.bfloat16) for index in range(3)]
    x = torch.randn(1, 256, config.hidden_size, device=device, dtype=torch.bfloat16)
    return layers, LlamaRotaryEmbedding(config).to(device)(x, torch.arange(256, device=device)[None]), x


def check_compiled(layers: list[torch.nn.Module], rotary: tuple, x: torch.Tensor, compile: Callable = torch.compile) -> Iterator[Row]:
    """Forward and input gradient through the layers before and after `layer.forward = compile(layer.forward)`."""
    from torch._dynamo.utils import counters

    def passes() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = leaf = x.detach().requires_grad_()
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotary)
        return hidden, torch.autograd.grad(hidden.float().square().mean(), leaf)[0]

    eager, eager_seconds = passes(), median_seconds(passes, x.device.type)
    for layer in layers:
        layer.forward = compile(layer.forward)
    torch._dynamo.reset()
    counters.clear()
    fused = passes()
    version, graphs = f"torch {torch.__version__}", counters["stats"]["unique_graphs"]
    speed = eager_seconds / median_seconds(passes, x.device.type)
    error = max(map(relative_error, fused, eager))
    yield judge("compiled layer", version, error, BOUND, "nothing to do: the loop does not compile its layers yet", speed=speed, slowest=0.5)
    remedy = 'TORCH_LOGS=recompiles names the guard; "memory_efficient_linear": false in ds_config.json'
    yield judge("compiled layer, graphs beyond the first", version, abs(graphs - 1), 0.0, remedy)


def main() -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("gcc")):
        yield Row("compiled layer", "", "missing", note="torch.compile needs a C++ compiler on PATH, which only this check uses yet")
        return
    if device == "cpu":
        torch._inductor.config.cpp.simdlen = 1  # scalar kernels: g++ takes half the time over them, and nobody trains on them
    yield from check_compiled(*llama_layers(device))


if __name__ == "__main__":
    emit(guarded("compiled layer", main, required=False))
