"""Whether a family keeps packed documents apart, shown by running it before a weight is read.

A small copy of the base, with its own code and a few narrow layers, gets three documents in one row
and then each alone, without anything of this project. What is not attention over `cu_seqlens`, a
norm, a feed-forward block or an embedding shows as a difference: a convolution or a state that runs
on into the next document, an attention that ignores what it is given, a position that counts from
the row's start.
"""

import copy
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from ..config.schema import Config, ConfigError
from ..data.batch_plan import PackingSpec
from ..data.collate import collate
from ..data.tokenization import IGNORE, Example
from ..kernels.attention import ATTENTION_BACKENDS, AttentionError
from ..model.loading import LIBRARY_ERRORS, first_line, resolve_base
from ..model.structure import decoder_layers, switch_off_dropout
from ..optim.lora_targets import put_lora

LENGTHS = (37, 5, 90)  # tokens of the documents
TOLERANCE = 1e-3  # of losses in nats, and of gradients relative to the plain ones; fp32
WIDTH, VOCABULARY, HEADS, EXPERTS, LAYERS = 128, 256, 4, 4, 4
NARROWED = {  # sizes of the copy; the base's own where that is smaller
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "shared_intermediate_size": WIDTH,
    "ffn_dim": WIDTH,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


def check_isolation(config: Config) -> None:
    """Raises ConfigError where the base mixes packed documents, or can't be trained here at all.

    It takes a second on a CPU, and no weights.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model_config = AutoConfig.from_pretrained(
                **resolve_base(config.base, config.revision), revision=config.revision
            )
            if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise ConfigError(
                    f"transformers has no language model for {model_config.model_type} "
                    "(AutoModelForCausalLM); take a base of text alone"
                )
            model = build_copy(model_config)
            check_linear_layers(decoder_layers(model))
            problem = find_difference(model, config.max_seq_len)
            if not problem and config.method != "full":
                put_lora(model, config.lora)
        except (ConfigError, AttentionError) as error:
            raise ConfigError(f"base={config.base}: {error}") from error
        except LIBRARY_ERRORS as error:
            raise ConfigError(
                f"base={config.base}: this family can't be trained on packed rows "
                f"({first_line(error)}); take a base built like Llama"
            ) from error
    if problem:
        raise ConfigError(
            f"base={config.base}: {type(model).__name__} does not keep packed documents apart "
            f"({problem}); take a base with attention alone"
        )


def check_linear_layers(layers: nn.ModuleList) -> None:
    """Raises ConfigError where a linear layer computes more than x W^T.

    Quantisation and LoRA would put a plain one in its place.
    """
    for module in layers.modules():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            raise ConfigError(
                f"{type(module).__name__} is more than a linear layer, which quantisation and LoRA "
                "would take it for; take another base"
            )


def build_copy(model_config) -> Any:
    """A model of the configuration's family with random weights and few narrow layers, in fp32.

    Where the family's sizes depend on each other in another way, the layers are as wide as the
    base's.
    """
    try:
        return build(narrow(model_config, NARROWED))
    except LIBRARY_ERRORS:
        return build(narrow(model_config, {}))


def build(model_config) -> Any:
    attention = ATTENTION_BACKENDS["sdpa"].transformers_name
    model = AutoModelForCausalLM.from_config(
        model_config, dtype=torch.float32, attn_implementation=attention
    )
    switch_off_dropout(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:  # large enough for each part to matter
                p.normal_(std=p.shape[-1] ** -0.5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def narrow(model_config, sizes: dict[str, int]):
    """The configuration with few layers, a small vocabulary and these sizes."""
    values = copy.deepcopy(model_config.to_dict())
    values.pop("quantization_config", None)
    text = model_config.get_text_config(decoder=True)
    inner = values
    if text is not model_config:
        (key,) = [k for k in model_config.sub_configs if getattr(model_config, k, None) is text]
        inner = values[key]
        for part in values.values():  # what sees images is not run
            if isinstance(part, dict) and part is not inner:
                for key in ("num_hidden_layers", "depth", "num_layers"):
                    if isinstance(part.get(key), int):
                        part[key] = min(2, part[key])
    narrow_layers(inner)
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(inner.get(key), int):
            inner[key] = min(VOCABULARY, inner[key])
    for key in values.keys() | inner.keys():
        if key.endswith("_token_id"):
            for part in (values, inner):
                if part.get(key) is not None:
                    part[key] = 0
    if sizes:
        narrow_heads(inner)
    for key, size in sizes.items():
        if isinstance(inner.get(key), int):
            inner[key] = min(size, inner[key])
        elif isinstance(inner.get(key), (list, tuple)):
            inner[key] = [min(size, value) for value in inner[key]]
    return type(model_config).from_dict(values)


def narrow_layers(values: dict[str, Any]) -> None:
    """Keeps the first layers, so many that each kind of `layer_types` is among them."""
    layers = values.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    kinds = values.get("layer_types") or []
    first = [list(kinds).index(kind) + 1 for kind in set(kinds)]
    kept = min(layers, max([LAYERS, *first]))
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == layers:
            values[key] = list(value[:kept])
    values["num_hidden_layers"] = kept


def narrow_heads(values: dict[str, Any]) -> None:
    """Fewer heads of the same size, as rotary positions depend on it."""
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads <= HEADS:
        return
    if not values.get("head_dim"):
        values["hidden_size"] = hidden // heads * HEADS
    key_heads = values.get("num_key_value_heads")
    values["num_attention_heads"] = HEADS
    if isinstance(key_heads, int):
        grouped = 2 if key_heads > 1 else 1
        values["num_key_value_heads"] = HEADS if key_heads == heads else grouped


def find_difference(model: Any, max_seq_len: int) -> str:
    """How a packed row differs from its documents alone, or "" where it does not.

    Raises AttentionError where attention is asked for what packed attention does not compute.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rng = np.random.default_rng(0)
    examples = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        examples.append(Example(str(number), ids, np.concatenate([[IGNORE], ids[1:]])))
    batch = collate(examples, PackingSpec(sum(LENGTHS), max(max_seq_len, max(LENGTHS))))
    model.train()
    with torch.no_grad():  # what a family refuses in training alone
        logits = model(**batch.model_inputs()).logits
    if logits.shape[1] != len(batch.targets):
        return "its logits are not those of the supervised tokens"
    model.eval()
    logits = model(**batch.model_inputs()).logits[0]
    packed = F.cross_entropy(logits, batch.targets, reduction="none")
    gradients = gradients_of(model, packed.sum())
    model.set_attn_implementation("eager")
    alone = torch.cat([losses_alone(model, example) for example in examples])
    reference = gradients_of(model, alone.sum())
    difference = (packed - alone).abs().max().item()
    if not difference <= TOLERANCE:
        return f"losses differ by {difference:.2g} nats from those of each document alone"
    norm = sum(g.double().square().sum() for g in reference) ** 0.5
    off = sum((a - b).double().square().sum() for a, b in zip(gradients, reference)) ** 0.5
    if not off <= TOLERANCE * norm:
        return f"gradients are {off / norm:.0%} off those of each document alone"
    return ""


def losses_alone(model: Any, example: Example) -> torch.Tensor:
    """The loss of each target of one document, as transformers computes it: [L - 1]."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:], reduction="none")


def gradients_of(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    """The gradient in each parameter, zeros where there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
