"""The memory of a run, counted before it: bytes on one GPU, component by component, from the base's shape alone.

Some components lie there for the whole run: their sizes follow from the weights, and the tests hold them against the tensors that are alive.
Others belong to a micro-batch: they follow from what the layers keep for their backward pass. `loop/fit.py` asks whether the sum fits.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ..config.schema import Config, ConfigError
from ..kernels.dropout import APART
from ..kernels.quantization import QUANTIZATIONS

LOADED = (
    "NF4 codes",
    "quantisation state",
    "16-bit weights",
    "adapter",
    "dequantised copies",
)  # before the engine is made
STATES = ("fp32 masters", "Adam moments", "gradients, fp32", "gradient bucket")  # with the engine
WORKING = (
    "gathered weights",
    "activations",
    "logits",
    "layer in work",
    "dropout mask",
    "update",
)  # in a step
EVERY_WEIGHT = (
    2**62
)  # a persistence threshold of DeepSpeed's above all weights: each rank keeps them whole
SLACK = 0.15  # of WORKING: rows differ in length, and a block that was freed often fits the next tensor badly


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights, a figure for each parameter, for ZeRO-3 cuts up each by itself."""

    matrices: tuple[int, ...]  # of linear layers, which NF4 stores
    other: tuple[int, ...]  # embeddings, head, norms, biases
    trained: tuple[int, ...]
    widths: tuple[int, ...]  # inputs of each LoRA module


_counted: dict[tuple, WeightCounts] = {}


def count_weights(shape, config: Config) -> WeightCounts:
    """Of the base and its adapter, on the meta device: nothing is loaded. shape: the base's configuration. Takes 1 s for 70 billion."""
    key = (shape.to_json_string(), config.method, repr(config.lora))
    if key not in _counted:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
        inner = [
            m.weight
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and n != "lm_head"
        ]
        other = [p.numel() for p in model.parameters() if not any(p is w for w in inner)]
        matrices, trained, widths = (
            [w.numel() for w in inner],
            [p.numel() for p in model.parameters()],
            [],
        )
        if config.method != "full":
            try:
                with torch.device("meta"):
                    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"lora: {str(error).splitlines()[0][:200]}") from error
            trained = [p.numel() for n, p in model.named_parameters() if "lora_" in n]
            widths = [m.in_features for m in model.modules() if hasattr(m, "lora_A")]
        _counted[key] = WeightCounts(*map(tuple, (matrices, other, trained, widths)))
    return _counted[key]


def saved_bytes_per_token(shape, config: Config, fused: bool, size: int) -> int:
    """Bytes that a decoder layer of Llama's kind keeps for its backward pass for each token. size: bytes of a number.

    Fused: the layer's input, two norms' outputs, the residual between them, queries, keys, values and attention's output, gate and up, and what
    LoRA's A made. Unfused: norms keep fp32, each LoRA module its own dropped-out input, SwiGLU silu(gate) as well."""
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    head = getattr(shape, "head_dim", None) or hidden // heads
    q, kv = heads * head, (getattr(shape, "num_key_value_heads", None) or heads) * head
    attention = (2 * q + 2 * kv) * size + 4 * heads  # and logsumexp in fp32
    low = 0 if config.method == "full" else 7 * config.lora["r"] * size
    if fused and config.method != "full":
        return (
            attention + low + 2 * 4 + (4 * hidden + 2 * inner) * size
        )  # and each norm's 1 / root mean square
    inputs = 2 * hidden + inner  # of the linear layers; attention's output is counted above
    if config.method == "full":
        inputs += 2 * hidden  # of the norms' weights
    elif config.lora["lora_dropout"]:
        inputs = 5 * hidden + q + inner
    return attention + low + 2 * (4 * hidden + 4) + (inputs + 3 * inner) * size


def max_rows(config: Config, world_size: int) -> int:
    """That a rank computes at once. Packing whole examples leaves gaps: on several ranks a row more than the even share saves a second, half
    empty micro-batch."""
    return min(config.batch_size, -(-config.batch_size // world_size) + (world_size > 1))


def estimate_memory(
    shape,
    config: Config,
    ds: dict,
    world_size: int,
    rows: float,
    checkpointing: bool,
    fused: bool,
    dequantized: bool,
    supervised: float = 1 / 3,
    recorded: bool = False,
) -> dict[str, int]:
    """{component: bytes on one GPU} at the fullest moment of a step, LOADED, STATES, WORKING and "allocator slack". ds: DeepSpeed's configuration;
    rows: of a micro-batch; supervised: the share of its tokens that have logits; dequantized: whether NF4 weights are kept in bf16 too;
    recorded: whether layers are CUDA graphs, whose gradients have places of their own and whose activations' memory no other tensor may use."""
    w, zero = count_weights(shape, config), ds["zero_optimization"]
    quantization = QUANTIZATIONS[config.quantization] if config.quantization else None
    size = 2 if ds.get("bf16", {}).get("enabled") else 4  # bytes of a number that is computed with
    offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
    # Steps are cut evenly: half a row more than the even share is rarely seen, with attention counted a whole one.
    even = config.batch_size / world_size + (world_size > 1) / 2
    tokens = int(min(rows, max(even, 1)) * config.max_seq_len)

    def share(sizes) -> int:
        return sum(-(-n // world_size) for n in sizes)

    frozen = [] if config.method == "full" else w.other if quantization else w.other + w.matrices
    codes = [quantization.code_bytes(n) for n in w.matrices] if quantization else []
    trained = share(w.trained)
    parts = dict.fromkeys((*LOADED, *STATES, *WORKING), 0)
    if not offloaded:
        parts |= {
            "NF4 codes": share(codes),
            "16-bit weights": share(frozen) * size,
            "adapter": trained * size,
        }
    if quantization:
        parts["quantisation state"] = sum(
            quantization.state_bytes(n, config.double_quant) for n in w.matrices
        )
        parts["dequantised copies"] = dequantized * sum(w.matrices) * size
    communicated = {"fp32": 4, "bf16": 2, "fp16": 2}.get(
        ds.get("communication_data_type", ""), size
    )
    bucket = (
        zero.get("contiguous_gradients", True)
        * zero.get("reduce_bucket_size", 500_000_000)
        * communicated
    )
    parts |= {
        "fp32 masters": trained * 4 * (size == 2 or offloaded),
        "Adam moments": trained * 8,
        "gradients, fp32": trained * 4,
    }
    parts["gradient bucket"] = int(bucket)

    if (
        world_size > 1 or offloaded
    ):  # ZeRO-3 counts in numbers as they are stored: NF4 in bf16 holds four weights in one
        dtype = torch.bfloat16 if size == 2 else torch.float32
        unit = quantization.storage_dtype(dtype).itemsize if quantization else 1
        stored = [(n // unit, n) for n in codes]
        stored += [(n, n * size) for n in (*frozen, *w.trained)]
        small = zero.get("stage3_param_persistence_threshold", 100_000)
        stays = sum(b for n, b in stored if n <= small)
        large = [(n, b) for n, b in stored if n > small]
        most = sum(n for n, _ in large)
        # What the backward pass will want again within the reuse distance stays there, beside the layer in work and the next ones.
        window = zero.get("stage3_max_reuse_distance", 10**9) + zero.get(
            "stage3_prefetch_bucket_size", 5 * 10**7
        )
        window += most / shape.num_hidden_layers
        there = sum(b for _, b in large) * min(1, window / max(1, most))
        # The largest, the output layer, arrives in one piece and is copied into its shape, or the embedding comes beside it.
        parts["gathered weights"] = int(
            stays + max(there, 2 * max((b for _, b in large), default=0))
        )
        parts["gathered weights"] += (
            (small == EVERY_WEIGHT) * sum(w.trained) * size
        )  # where the others' updates arrive

    layer, n_logits = (
        tokens * saved_bytes_per_token(shape, config, fused, size),
        tokens * supervised * shape.vocab_size,
    )
    of_a_layer = tokens * shape.hidden_size * size if checkpointing else layer
    of_a_layer += recorded * tokens * shape.hidden_size * size  # the gradient of its input
    parts["activations"] = (
        shape.num_hidden_layers * of_a_layer + tokens * shape.hidden_size * 4
    )  # and the last norm's, in fp32
    # bf16, and for the loss fp32, its logarithm of probabilities and gradients; then the layers' turn comes, and bf16 alone is left.
    parts["logits"] = int(n_logits * (size + 12))
    work = (
        layer * checkpointing
        + tokens * (4 * shape.intermediate_size + 2 * shape.hidden_size) * size
    )
    work += bool(quantization and not dequantized) * max(w.matrices) * size
    parts["layer in work"] = max(0, int(work + n_logits * size) - parts["logits"])
    if w.widths and config.lora["lora_dropout"]:
        parts["dropout mask"] = tokens * (
            -(-max(w.widths) // APART) * APART + APART * len(w.widths)
        )
    # When the optimizer has its turn, activations are gone and the gradients are copied into one piece.
    parts["update"] = max(0, trained * 4 - sum(parts[name] for name in WORKING))
    if recorded:
        parts["update"] = sum(w.trained) * size + trained * 4
    return parts | {"allocator slack": int(SLACK * sum(parts[name] for name in WORKING))}


def peak_bytes(parts: dict[str, int]) -> int:
    """What the components add up to, without the slack: what `peak.highest` sees."""
    return sum(parts.values()) - parts["allocator slack"]
