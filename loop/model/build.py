"""The model that is trained, set up for this machine: kernels, placement of weights, micro-batch.

Each choice depends on the ones before it and on the memory that is free at that moment.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn as nn

from ..config.schema import Config
from ..data.dataset import TrainingData
from ..distributed.seeding import seed_everything
from ..distributed.timeline import timed
from ..distributed.world import Ranks
from ..kernels.attention_backends import choose_backend
from ..kernels.dropout import DropoutMasks, install_dropout
from ..kernels.fuse import choose_dequantized, choose_fused_layers, install_fused_parts
from ..memory.estimate import RunShape, estimate_memory
from ..memory.planner import choose_micro_batch, choose_weight_placement, free_gpu_bytes
from ..optim.adamw import optimizer_spec, optimizer_warning, trainable_parameters
from ..optim.lora_targets import count_expert_weights
from .activation_checkpointing import use_checkpointing
from .loading import load_model
from .quantization import compute_dtype
from .replay import can_replay
from .structure import attention_shape, decoder_layers


@dataclass
class Execution:
    """How the model is run: what was chosen for this machine, equal on all ranks."""

    ds_config: dict  # for deepspeed.initialize
    dropout: DropoutMasks  # LoRA's
    max_tokens: int  # of a micro-batch
    replicated: bool  # each rank holds all weights
    use_cuda_graphs: bool  # capture the decoder layers and replay them
    # Takes the tokens of a micro-batch, returns {component: bytes on a GPU}.
    estimate_memory: Callable[[int], dict[str, int]]
    description: str  # for the log's line about the machine
    warnings: list[str]  # what was asked for or expected and is not used, and why


@timed("base")
def build_model(
    config: Config, ds_config: dict, model_config, data: TrainingData, ranks: Ranks
) -> tuple[nn.Module, Execution]:
    """The base with its LoRA, and how it is run here. Every rank must call it.

    Args:
        ds_config: DeepSpeed's configuration, as the run's files give it.
        model_config: the base's transformers configuration.
        data: its fraction of supervised tokens decides how many logits a step has.

    Raises AttentionError or ConfigError where what was asked for can't run here.
    """
    optimizer = optimizer_spec(config.optimizer)
    dtype = compute_dtype(ds_config)
    with timed("kernel tests"):
        backend, attention = choose_backend(
            config.attention, ranks.device, dtype, attention_shape(model_config)
        )
        fused, layers_warning = choose_fused_layers(config, dtype, ranks)
    # Equal on all ranks: LoRA's initial weights are random, and each rank holds a shard of them.
    seed_everything(config.seed)
    model = load_model(config, ds_config, ranks.device, backend, start=config.adapter)
    dropout = install_dropout(model, config.lora["lora_dropout"], config.seed, ranks.device)
    num_trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainable_parameters(model))

    def free_bytes() -> int | None:
        return free_gpu_bytes(num_trained, optimizer.bytes_per_weight, ranks)

    run = RunShape(ranks.world_size, fused, data.supervised_fraction)
    ds_config, replicated = choose_weight_placement(
        config, ds_config, model_config, run, free_bytes()
    )
    run = replace(run, cuda_graphs=can_replay(config, replicated, ranks, backend))
    if fused:
        run, unfused = fuse_layers(config, model, run, free_bytes(), ranks)
        if unfused:
            names = ", ".join(sorted(unfused))
            layers_warning = f"layers      {names}: computed as in PEFT and transformers, not fused"
    rows, checkpointing = choose_micro_batch(config, ds_config, model_config, run, free_bytes())
    if checkpointing:
        use_checkpointing(model)

    def estimate(tokens: int) -> dict[str, int]:
        num_rows = tokens / config.max_seq_len
        return estimate_memory(config, ds_config, model_config, run, num_rows, checkpointing)

    attention, _, attention_warning = attention.partition("; ")
    if ranks.device.type != "cuda":
        attention_warning = ""  # a CPU has only one backend
    warnings = [attention_warning, layers_warning, *other_warnings(config, model)]
    return model, Execution(
        ds_config=ds_config,
        dropout=dropout,
        max_tokens=rows * config.max_seq_len,
        replicated=replicated,
        use_cuda_graphs=run.cuda_graphs and not checkpointing,
        estimate_memory=estimate,
        description=describe_execution(attention, replicated, checkpointing),
        warnings=list(filter(None, warnings)),
    )


@timed("base")
def build_trained(
    config: Config,
    ds_config: dict,
    model_config,
    adapter: str | None,
    supervised_fraction: float,
    ranks: Ranks,
) -> tuple[nn.Module, int]:
    """(the base with an adapter, the tokens of a micro-batch), to be evaluated as in its run.

    Every rank must call it. Raises what `build_model` raises.

    Args:
        adapter: a folder, or None for a new one, which changes no output.
        supervised_fraction: of the tokens that will be evaluated.
    """
    dtype = compute_dtype(ds_config)
    with timed("kernel tests"):
        shape = attention_shape(model_config)
        backend, _ = choose_backend(config.attention, ranks.device, dtype, shape)
        fused, _ = choose_fused_layers(config, dtype, ranks)
    # Equal on all ranks: each holds a shard of LoRA's weights.
    seed_everything(config.seed)
    model = load_model(config, ds_config, ranks.device, backend, adapter=adapter)
    run = RunShape(ranks.world_size, fused, supervised_fraction)
    if fused:
        run, _ = fuse_layers(config, model, run, free_gpu_bytes(0, 0, ranks), ranks)
    free_bytes = free_gpu_bytes(0, 0, ranks)
    rows, _ = choose_micro_batch(config, ds_config, model_config, run, free_bytes)
    return model, rows * config.max_seq_len


def fuse_layers(
    config: Config, model: nn.Module, run: RunShape, free_bytes: int | None, ranks: Ranks
) -> tuple[RunShape, set[str]]:
    """Fuses the decoder layers where that can be done. Every rank must call it.

    Returns (the run with what was done, the classes and functions that could not be fused). Layers
    count as fused only where nothing is left.
    """
    layers = decoder_layers(model)
    dequantized = ranks.all(choose_dequantized(config, layers, free_bytes, run.cuda_graphs))
    unfused = install_fused_parts(layers, dequantized)
    return replace(run, dequantized=dequantized, fused=not unfused), unfused


def other_warnings(config: Config, model: nn.Module) -> list[str]:
    """Lines about the optimizer and about experts without LoRA, or "" for each."""
    experts = count_expert_weights(model)
    line = ""
    if config.method != "full" and experts:
        line = (
            f"experts     {experts:,} weights, stored as one tensor for all experts of a layer, "
            "get no LoRA"
        )
    return [optimizer_warning(config), line]


def describe_execution(attention: str, replicated: bool, checkpointing: bool) -> str:
    """One line for the log. attention: the backend, as `choose_backend` describes it."""
    placement = ", weights replicated" if replicated else ""
    return (
        f"ZeRO-3{placement}; {attention}; gradient checkpointing {'on' if checkpointing else 'off'}"
    )
