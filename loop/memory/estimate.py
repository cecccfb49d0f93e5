"""The memory of a run, estimated before it: bytes on one GPU, component by component.

Only the base's transformers configuration is needed. The components in LOADED and STATES exist for
the whole run; their sizes follow from the weights. Those in WORKING belong to a micro-batch; they
follow from what the layers save for their backward pass. The tests compare both with tensors that
are alive. `planner.py` asks whether the sum fits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from transformers import AutoModelForCausalLM

from ..config.schema import Config
from ..kernels.dropout import mask_width
from ..kernels.quantization import QUANTIZATIONS, Quantization
from ..optim.adamw import optimizer_spec
from ..optim.lora_targets import put_lora

# Before the engine is made.
LOADED = (
    "NF4 codes",
    "quantisation state",
    "16-bit weights",
    "adapter",
    "dequantised copies",
)
# Made with the engine. "Adam moments" is the state of whatever optimizer the run has.
STATES = ("fp32 masters", "Adam moments", "gradients, fp32", "gradient bucket")
# In a step.
WORKING = (
    "gathered weights",
    "activations",
    "logits",
    "layer in work",
    "dropout mask",
    "update",
)
# A persistence threshold of DeepSpeed's above all weights: each rank then holds them in full.
EVERY_WEIGHT = 2**62
# Numbers of logits that the loss has in fp32 at once: a chunk of 32 MiB.
LOSS_CHUNK = 2**23
# Of WORKING: rows differ in length, and a block that was freed often fits the next tensor badly.
SLACK = 0.15


@dataclass(frozen=True)
class RunShape:
    """What the memory of a run depends on beside its configuration and its base."""

    world_size: int
    fused: bool  # decoder layers run in few kernels
    supervised_fraction: float = 1 / 3  # of the tokens, which have logits
    dequantized: bool = False  # quantised weights are held dequantised as well
    # Layers that do not recompute are CUDA graphs. Their gradients have addresses of their own, and
    # no other tensor may use the memory of their activations.
    cuda_graphs: bool = False


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights, one for each parameter, as ZeRO-3 partitions each by itself."""

    matrices: tuple[int, ...]  # of linear layers, which NF4 stores
    other: tuple[int, ...]  # embeddings, head, norms, biases
    trained: tuple[int, ...]
    widths: tuple[int, ...]  # inputs of each LoRA module
    embedding: int = 0  # of `other`, those of an embedding that is not the output layer as well


_weight_counts: dict[tuple, WeightCounts] = {}


def count_weights(config: Config, model_config) -> WeightCounts:
    """The weights of the base and its adapter, counted on the meta device: nothing is loaded.

    Takes 1 s for 70 billion weights; the result is cached. Raises ConfigError where PEFT refuses
    `config.lora` for this base.
    """
    key = (model_config.to_json_string(), config.method, repr(config.lora))
    if key not in _weight_counts:
        _weight_counts[key] = _count_weights(config, model_config)
    return _weight_counts[key]


def _count_weights(config: Config, model_config) -> WeightCounts:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    linears = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    linear_ids = {id(weight) for weight in linears}
    matrices = tuple(weight.numel() for weight in linears)
    other = tuple(p.numel() for p in model.parameters() if id(p) not in linear_ids)
    if config.method == "full":
        trained = tuple(p.numel() for p in model.parameters())
        return WeightCounts(matrices, other, trained, widths=())
    with torch.device("meta"):
        model = put_lora(model, config.lora)
    trained = tuple(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    is_tied = model_config.get_text_config().tie_word_embeddings
    embedding = 0 if is_tied else model.get_input_embeddings().weight.numel()
    lora_modules: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A")]
    widths = tuple(module.in_features for module in lora_modules)
    return WeightCounts(matrices, other, trained, widths, embedding)


def saved_bytes_per_token(config: Config, model_config, fused: bool, itemsize: int) -> int:
    """Bytes that a decoder layer of Llama's kind saves for its backward pass, for each token.

    Fused: the layer's input, two norms' outputs, the residual between them, queries, keys, values
    and attention's output, gate and up, and the outputs of LoRA's A. Unfused: norms save fp32, each
    LoRA module its own input after dropout, SwiGLU silu(gate) as well.
    """
    hidden = model_config.hidden_size
    inner = int(np.max(model_config.intermediate_size))  # some families have one for each layer
    heads = model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    head_dim = getattr(model_config, "head_dim", None) or hidden // heads
    q = heads * head_dim
    kv = kv_heads * head_dim
    attention = (2 * q + 2 * kv) * itemsize + 4 * heads  # and logsumexp in fp32
    if config.method == "full":
        inputs = 4 * hidden + inner  # of the linear layers and of the norms
        return attention + 2 * (4 * hidden + 4) + (inputs + 3 * inner) * itemsize
    lora_a = 7 * config.lora["r"] * itemsize
    if fused:
        norms = 2 * 4  # 1 / root mean square of each
        return attention + lora_a + norms + (4 * hidden + 2 * inner) * itemsize
    inputs = 2 * hidden + inner  # of the linear layers; attention's output is counted above
    if config.lora["lora_dropout"]:
        inputs = 5 * hidden + q + inner
    return attention + lora_a + 2 * (4 * hidden + 4) + (inputs + 3 * inner) * itemsize


def max_rows(config: Config, world_size: int) -> int:
    """The most rows that a rank computes at once.

    Packing complete examples leaves gaps. On several ranks one row more than the even share saves a
    second micro-batch that would be half empty.
    """
    even = -(-config.batch_size // world_size)
    return min(config.batch_size, even + 1 if world_size > 1 else even)


def compute_itemsize(ds_config: dict) -> int:
    """Bytes of a number that the model computes with: bf16 or fp32."""
    return 2 if ds_config.get("bf16", {}).get("enabled") else 4


def offloads_parameters(ds_config: dict) -> bool:
    """Whether ZeRO-3 holds the weights in the CPU's memory or on a disk."""
    offload = ds_config["zero_optimization"].get("offload_param") or {}
    return offload.get("device", "none") != "none"


def shard_numel(sizes, world_size: int) -> int:
    """Numbers in a rank's shards of parameters of these sizes, padding included."""
    return sum(-(-n // world_size) for n in sizes)


def quantization_of(config: Config) -> Quantization | None:
    """How the frozen base is quantised, None where it is not."""
    return QUANTIZATIONS[config.quantization] if config.quantization else None


def code_sizes(config: Config, counts: WeightCounts) -> list[int]:
    """Bytes of the quantised weights' codes, for each matrix; empty without quantisation."""
    quantization = quantization_of(config)
    if quantization is None:
        return []
    return [quantization.code_bytes(n) for n in counts.matrices]


def frozen_sizes(config: Config, counts: WeightCounts) -> tuple[int, ...]:
    """Numbers of weights that are frozen and not quantised, for each parameter."""
    if config.method == "full":
        return ()
    frozen = counts.other if config.quantization else counts.other + counts.matrices
    if config.embedding_on_cpu:
        at = frozen.index(counts.embedding)
        return frozen[:at] + frozen[at + 1 :]
    return frozen


def quantization_state_bytes(config: Config, counts: WeightCounts) -> int:
    """Bytes of scales and codebooks, which every rank holds in full."""
    quantization = quantization_of(config)
    if quantization is None:
        return 0
    return sum(quantization.state_bytes(n, config.double_quant) for n in counts.matrices)


def dequantized_bytes(config: Config, ds_config: dict, counts: WeightCounts) -> int:
    """Bytes of all quantised weights when they are held dequantised as well."""
    if not config.quantization:
        return 0
    return sum(counts.matrices) * compute_itemsize(ds_config)


def weights_bytes(
    config: Config, ds_config: dict, counts: WeightCounts, run: RunShape
) -> dict[str, int]:
    """Bytes of the components in LOADED."""
    itemsize = compute_itemsize(ds_config)
    parts = dict.fromkeys(LOADED, 0)
    if not offloads_parameters(ds_config):
        frozen = shard_numel(frozen_sizes(config, counts), run.world_size)
        parts["NF4 codes"] = shard_numel(code_sizes(config, counts), run.world_size)
        parts["16-bit weights"] = frozen * itemsize
        parts["adapter"] = shard_numel(counts.trained, run.world_size) * itemsize
    parts["quantisation state"] = quantization_state_bytes(config, counts)
    if run.dequantized:
        parts["dequantised copies"] = dequantized_bytes(config, ds_config, counts)
    return parts


def optimizer_bytes(
    config: Config, ds_config: dict, counts: WeightCounts, world_size: int
) -> dict[str, int]:
    """Bytes of the components in STATES. Raises ConfigError for an unknown optimizer."""
    trained = shard_numel(counts.trained, world_size)
    has_masters = compute_itemsize(ds_config) == 2 or offloads_parameters(ds_config)
    return {
        "fp32 masters": 4 * trained if has_masters else 0,
        "Adam moments": optimizer_spec(config.optimizer).bytes_per_weight * trained,
        "gradients, fp32": 4 * trained,
        "gradient bucket": gradient_bucket_bytes(ds_config),
    }


def storage_itemsize(config: Config, ds_config: dict) -> int:
    """Bytes of a number in the tensors that hold the codes; 1 without quantisation."""
    quantization = quantization_of(config)
    if quantization is None:
        return 1
    dtype = torch.bfloat16 if compute_itemsize(ds_config) == 2 else torch.float32
    return quantization.storage_dtype(dtype).itemsize


def gradient_bucket_bytes(ds_config: dict) -> int:
    """Bytes of DeepSpeed's buffer of gradients that wait for their reduction."""
    zero = ds_config["zero_optimization"]
    if not zero.get("contiguous_gradients", True):
        return 0
    itemsizes = {"fp32": 4, "bf16": 2, "fp16": 2}
    dtype = ds_config.get("communication_data_type", "")
    itemsize = itemsizes.get(dtype, compute_itemsize(ds_config))
    return int(zero.get("reduce_bucket_size", 500_000_000) * itemsize)


def gathered_bytes(
    config: Config, ds_config: dict, model_config, counts: WeightCounts, run: RunShape
) -> int:
    """Bytes of the weights that ZeRO-3 holds in full beside the shards, at most."""
    if run.world_size == 1 and not offloads_parameters(ds_config):
        return 0
    zero = ds_config["zero_optimization"]
    itemsize = compute_itemsize(ds_config)
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    # ZeRO-3 counts numbers as they are stored: in bf16 a number holds four NF4 weights.
    code_itemsize = storage_itemsize(config, ds_config)
    plain = (*frozen_sizes(config, counts), *counts.trained)
    stored = [(size // code_itemsize, size) for size in code_sizes(config, counts)]
    stored += [(n, n * itemsize) for n in plain]  # (numbers, bytes) of each parameter
    persistent = sum(size for n, size in stored if n <= threshold)
    large = [(n, size) for n, size in stored if n > threshold]
    num_large = sum(n for n, _ in large)
    # What the backward pass wants again within the reuse distance stays, beside the current layer
    # and the next ones.
    window = zero.get("stage3_max_reuse_distance", 10**9)
    window += zero.get("stage3_prefetch_bucket_size", 5 * 10**7)
    window += num_large / model_config.num_hidden_layers
    reused = sum(size for _, size in large) * min(1, window / max(1, num_large))
    # The largest one, the output layer, arrives in one piece and is copied into its shape, or the
    # embedding comes beside it.
    largest = 2 * max((size for _, size in large), default=0)
    total = int(persistent + max(reused, largest))
    if threshold == EVERY_WEIGHT:
        total += sum(counts.trained) * itemsize  # the buffer for the other ranks' updates
    return total


def micro_batch_tokens(config: Config, world_size: int, rows: float) -> int:
    """Tokens of a rank's fullest micro-batch of at most `rows` rows.

    Steps are split evenly. Half a row more than the even share is rarely seen, with attention
    counted a full one.
    """
    even = config.batch_size / world_size
    if world_size > 1:
        even += 0.5
    return int(min(rows, max(even, 1)) * config.max_seq_len)


def activation_bytes(
    config: Config, ds_config: dict, model_config, run: RunShape, tokens: int, checkpointing: bool
) -> int:
    """Bytes of what all layers save for the backward pass of a micro-batch."""
    itemsize = compute_itemsize(ds_config)
    hidden = model_config.hidden_size
    if checkpointing:
        per_layer = tokens * hidden * itemsize  # its input
    else:
        per_layer = tokens * saved_bytes_per_token(config, model_config, run.fused, itemsize)
        if run.cuda_graphs:
            per_layer += tokens * hidden * itemsize  # the gradient of its input
    last_norm = tokens * hidden * 4  # in fp32
    return model_config.num_hidden_layers * per_layer + last_norm


def logits_bytes(num_logits: float, itemsize: int, chunked: bool) -> int:
    """Bytes of the logits and of the loss.

    In fp32 the loss holds logits, log-probabilities and gradients: of all at once, or of a chunk,
    where the gradients of all are in the compute dtype.
    """
    if not chunked or num_logits <= LOSS_CHUNK:
        return int(num_logits * (itemsize + 12))
    return int(num_logits * 2 * itemsize + LOSS_CHUNK * 12)


def current_layer_bytes(
    config: Config, ds_config: dict, model_config, run: RunShape, tokens: int, checkpointing: bool
) -> int:
    """Bytes that one layer needs while its backward pass runs, beside what all layers saved."""
    itemsize = compute_itemsize(ds_config)
    hidden = model_config.hidden_size
    inner = int(np.max(model_config.intermediate_size))  # some families have one for each layer
    total = tokens * (4 * inner + 2 * hidden) * itemsize
    if checkpointing:
        total += tokens * saved_bytes_per_token(config, model_config, run.fused, itemsize)
    if config.quantization and not run.dequantized:
        total += max(count_weights(config, model_config).matrices) * itemsize
    return total


def dropout_mask_bytes(config: Config, counts: WeightCounts, tokens: int) -> int:
    """Bytes of the dropout mask that all LoRA modules of a micro-batch share."""
    if not counts.widths or not config.lora["lora_dropout"]:
        return 0
    return tokens * mask_width(counts.widths)


def estimate_memory(
    config: Config,
    ds_config: dict,
    model_config,
    run: RunShape,
    rows: float,
    checkpointing: bool,
) -> dict[str, int]:
    """{component: bytes on one GPU} at the fullest moment of a step.

    The keys are LOADED, STATES, WORKING and "allocator slack", in this order.

    Args:
        ds_config: DeepSpeed's configuration.
        model_config: the base's transformers configuration.
        rows: of a micro-batch, each of max_seq_len tokens.
        checkpointing: layers recompute their activations; such layers are no CUDA graphs.
    """
    counts = count_weights(config, model_config)
    itemsize = compute_itemsize(ds_config)
    tokens = micro_batch_tokens(config, run.world_size, rows)
    num_logits = tokens * run.supervised_fraction * model_config.vocab_size

    parts = dict.fromkeys((*LOADED, *STATES, *WORKING), 0)
    parts |= weights_bytes(config, ds_config, counts, run)
    parts |= optimizer_bytes(config, ds_config, counts, run.world_size)
    parts["gathered weights"] = gathered_bytes(config, ds_config, model_config, counts, run)
    parts["activations"] = activation_bytes(
        config, ds_config, model_config, run, tokens, checkpointing
    )
    parts["logits"] = logits_bytes(num_logits, itemsize, config.chunked_loss)
    # A layer's backward pass runs after the loss, which leaves the logits in the compute dtype and
    # frees the rest. So the layer adds only what it needs beyond that.
    layer = current_layer_bytes(config, ds_config, model_config, run, tokens, checkpointing)
    parts["layer in work"] = max(0, int(layer + num_logits * itemsize) - parts["logits"])
    parts["dropout mask"] = dropout_mask_bytes(config, counts, tokens)

    # When the optimizer's turn comes, gradients are copied into one piece. Activations are gone,
    # except those of CUDA graphs.
    gradients = shard_numel(counts.trained, run.world_size) * 4
    if run.cuda_graphs and not checkpointing:
        parts["update"] = sum(counts.trained) * itemsize + gradients
    else:
        parts["update"] = max(0, gradients - sum(parts[name] for name in WORKING))
    slack = int(SLACK * sum(parts[name] for name in WORKING))
    return parts | {"allocator slack": slack}


def peak_bytes(parts: dict[str, int]) -> int:
    """The sum of the components without the slack: what `PeakMemory` measures."""
    return sum(parts.values()) - parts["allocator slack"]
