"""The model that is trained, as this machine can train it: kernels, micro-batch and what is kept where are chosen by what is there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn as nn

from ..config.schema import Config
from ..distributed.seeding import seed_everything
from ..distributed.world import Ranks
from ..kernels.attention_backends import choose_backend
from ..kernels.dropout import DropoutMasks, install_dropout
from ..kernels.fuse import choose_dequantized, choose_layers, fuse
from ..memory.estimate import estimate_memory
from ..memory.planner import choose_micro_batch, choose_weight_placement, free_gpu_bytes
from ..optim.adamw import choose_fused_adamw, trainable_parameters
from .activation_checkpointing import use_checkpointing
from .loading import load_model
from .quantization import dtype_of
from .replay import can_replay
from .structure import decoder_layers, heads_of


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


def build_model(
    config: Config, ds_config: dict, model_config, supervised_fraction: float, ranks: Ranks
) -> tuple[nn.Module, Execution]:
    """The base with its LoRA. supervised_fraction: the fraction of the tokens that have logits. Every rank
    must call it. Raises AttentionError or ConfigError where what was asked for can't run here."""
    ds, shape, supervised = ds_config, model_config, supervised_fraction
    backend, attention = choose_backend(
        config.attention, ranks.device, dtype_of(ds), heads_of(shape)
    )
    fused, layers = choose_layers(config, dtype_of(ds), ranks)
    seed_everything(
        config.seed
    )  # equal on all ranks: they share LoRA's random initial weights by halves
    model = load_model(config, ds, ranks.device, backend)
    dropout = install_dropout(model, config.lora["lora_dropout"], config.seed, ranks.device)

    num_trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainable_parameters(model))

    def free() -> int | None:
        return free_gpu_bytes(num_trained, ranks)

    ds, whole = choose_weight_placement(
        config, ds, shape, ranks.world_size, free(), fused, supervised
    )
    keep_dense, stayed, replayed = False, set(), can_replay(config, whole, ranks, backend)
    if fused:
        keep_dense = ranks.all(
            choose_dequantized(config, decoder_layers(model), free(), replayed)
        )
        if stayed := fuse(decoder_layers(model), keep_dense):
            layers = f"layers      {', '.join(sorted(stayed))}: computed as in PEFT and transformers, not fused"
    known = fused and not stayed, keep_dense, supervised
    rows, checkpointing = choose_micro_batch(
        config, ds, shape, ranks.world_size, free(), *known, replayed
    )
    if checkpointing:
        use_checkpointing(model)
    replayed = replayed and not checkpointing

    def predicted(tokens: int) -> dict[str, int]:
        return estimate_memory(
            shape,
            config,
            ds,
            ranks.world_size,
            tokens / config.max_seq_len,
            checkpointing,
            *known,
            replayed,
        )

    attention, _, passed_over = attention.partition("; ")
    described = f"ZeRO-3{', weights whole on each' if whole else ''}; {attention}; gradient checkpointing {'on' if checkpointing else 'off'}"
    passed_over = passed_over if ranks.device.type == "cuda" else ""  # a CPU has only one
    remarks = list(filter(None, [passed_over, layers, choose_fused_adamw(config.optimizer)[1]]))
    return model, Execution(
        ds, dropout, rows * config.max_seq_len, whole, replayed, predicted, described, remarks
    )
