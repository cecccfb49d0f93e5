"""Whether a family keeps packed documents apart, shown by running it before a weight is read.

A small copy of the base, with its own code and a few narrow layers, gets three documents in one row
and then each alone, without anything of this project. What is not attention over `cu_seqlens`, a
norm, a feed-forward block or an embedding shows as a difference: a convolution or a state that runs
on into the next document, an attention that ignores what it is given, a position that counts from
the row's start.
"""

import copy
import functools
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ..config.schema import Config, ConfigError
from ..data.batch_plan import PackingSpec
from ..data.collate import collate
from ..data.tokenization import IGNORE, Example
from ..kernels.attention import ATTENTION_BACKENDS, AttentionError
from ..model.loading import LIBRARY_ERRORS, checked_base, first_line
from ..model.structure import decoder_layers, switch_off_dropout
from ..untrusted.bases import read_model_config

LENGTHS = (37, 5, 90)  # tokens of the documents
TOLERANCE = 1e-3  # of losses in nats, and of gradients relative to the plain ones; fp32
WIDTH, VOCABULARY, HEADS, EXPERTS, LAYERS = 128, 256, 2, 4, 4
MOST_WEIGHTS = 500_000_000  # of the copy
NARROWED = {  # other sizes of the copy; the base's own where that is smaller
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
        model_config = None
        try:
            location = checked_base(config.base, config.revision)
            model_config = read_model_config(location, config.revision)
            if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise ConfigError(
                    f"transformers has no language model for {model_config.model_type} "
                    "(AutoModelForCausalLM); take a base of text alone"
                )
            model, problem = run_copy(model_config, config.max_seq_len)
            if not problem and config.method == "qlora":
                check_weights_are_not_read(model)
        except (ConfigError, AttentionError) as error:
            raise ConfigError(f"base={config.base}: {error}") from error
        except (*LIBRARY_ERRORS, MemoryError) as error:
            if key := unknown_name(error, model_config):
                raise ConfigError(
                    f"base={config.base}: config.json: {key}={str(error)[:80]}: is no name that "
                    "transformers knows; correct it"
                ) from error
            raise ConfigError(
                f"base={config.base}: this family can't be trained on packed rows "
                f"({first_line(error).partition('. ')[0]}); take a base built like Llama"
            ) from error
    if problem:
        raise ConfigError(
            f"base={config.base}: {type(model).__name__} does not keep packed documents apart "
            f"({problem}); take a base with attention alone"
        )


def unknown_name(error: BaseException, model_config) -> str:
    """The key of the configuration whose value transformers looked up in vain; "" for none."""
    if not isinstance(error, KeyError) or not error.args or model_config is None:
        return ""
    values = model_config.get_text_config(decoder=True).to_dict()
    wanted = error.args[0]
    return next((k for k, v in values.items() if isinstance(v, str) and v == wanted), "")


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


def check_weights_are_not_read(model: Any) -> None:
    """Raises ConfigError where the weight of a linear layer is used by another than the layer.

    Once it is quantised, a weight is a code and no number.
    """
    linears: list[Any] = [m for m in decoder_layers(model).modules() if isinstance(m, nn.Linear)]
    weights = [linear.weight for linear in linears]
    for linear in linears:
        linear.forward = functools.partial(F.linear, weight=linear.weight, bias=linear.bias)
        codes = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        linear.weight = nn.Parameter(codes, requires_grad=False)
    model.train()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except LIBRARY_ERRORS as error:
        raise ConfigError(
            f"{type(model).__name__} reads the weights of its linear layers itself, which can't be "
            "once they are quantised; set method=lora, or take another base"
        ) from error
    finally:
        for linear, weight in zip(linears, weights):
            del linear.forward
            linear.weight = weight


def run_copy(model_config, max_seq_len: int) -> tuple[Any, str]:
    """(model, problem) of a small copy; problem as in `find_difference`.

    Where the family's sizes depend on each other in another way than `NARROWED` has it, the layers
    are as wide as the base's, if memory allows. It shows where the copy is built, or where its
    matrices are multiplied.
    """
    model = None
    try:
        model = build(narrow(model_config, NARROWED))
        return model, find_difference(model, max_seq_len)
    except (ConfigError, AttentionError):
        raise
    except LIBRARY_ERRORS as error:
        if model is not None and not isinstance(error, RuntimeError):
            raise
        try:
            model = build(narrow(model_config, {}))
        except MemoryError:
            raise error from None
        return model, find_difference(model, max_seq_len)


def build(model_config) -> Any:
    """A model of the configuration's family with random weights, in fp32.

    Raises ConfigError, MemoryError above `MOST_WEIGHTS`, and what transformers raises.
    """
    attention = ATTENTION_BACKENDS["sdpa"].transformers_name
    options = {
        "dtype": torch.float32,
        "attn_implementation": attention,
        "trust_remote_code": False,
    }
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, **options)
    except KeyError as error:
        if attention in error.args:
            raise ConfigError(
                f"{model_config.model_type} has attention of its own, so packed attention can't "
                "take its place; take a base built like Llama"
            ) from error
        raise
    check_linear_layers(decoder_layers(model))
    if (num_weights := sum(p.numel() for p in model.parameters())) > MOST_WEIGHTS:
        raise MemoryError(f"a copy of a few layers has {num_weights:,} weights")
    model = AutoModelForCausalLM.from_config(model_config, **options)
    switch_off_dropout(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:  # large enough for each part to matter
                p.normal_(std=p.shape[-1] ** -0.5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def narrow(model_config, sizes: dict[str, int]):
    """The configuration with few layers, a small vocabulary and these sizes.

    sizes: {}: the layers are as wide as they were, and fewer.
    """
    values = copy.deepcopy(model_config.to_dict())
    values.pop("quantization_config", None)
    text = model_config.get_text_config(decoder=True)
    inner = values
    if text is not model_config:
        (key,) = [k for k in model_config.sub_configs if getattr(model_config, k, None) is text]
        inner = values[key]
        shorten_other_parts(values, inner)
    own_names = type(text).attribute_map
    usual_names = {own: usual for usual, own in own_names.items()}
    usual = {usual_names.get(key, key): value for key, value in inner.items()}
    keep_layers(usual, LAYERS if sizes else 2)
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(usual.get(key), int):
            usual[key] = min(VOCABULARY, usual[key])
    for part in (values, usual):
        for key in part:
            if key.endswith("_token_id") and part[key] is not None:
                part[key] = 0
    if sizes:
        narrow_heads(usual)
    for key, size in sizes.items():
        if isinstance(usual.get(key), int):
            usual[key] = min(size, usual[key])
        elif isinstance(usual.get(key), (list, tuple)):
            usual[key] = [min(size, value) for value in usual[key]]
    inner.clear()
    inner.update({own_names.get(key, key): value for key, value in usual.items()})
    return type(model_config).from_dict(values)


def shorten_other_parts(values: dict[str, Any], text: dict[str, Any]) -> None:
    """Two layers for what sees or hears, as it is not run."""
    for part in values.values():
        if isinstance(part, dict) and part is not text:
            for key in ("num_hidden_layers", "depth", "num_layers"):
                if isinstance(part.get(key), int):
                    part[key] = min(2, part[key])


def keep_layers(values: dict[str, Any], wanted: int) -> None:
    """Keeps the first layers, so many that each kind of `layer_types` is among them.

    All of them where the last ones take keys and values of earlier ones.
    """
    layers = values.get("num_hidden_layers")
    if not isinstance(layers, int) or values.get("num_kv_shared_layers"):
        return
    kinds = values.get("layer_types") or []
    first = [list(kinds).index(kind) + 1 for kind in set(kinds)]
    kept = min(layers, max([wanted, *first]))
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == layers:
            values[key] = list(value[:kept])
    values["num_hidden_layers"] = kept


def narrow_heads(values: dict[str, Any]) -> None:
    """Fewer heads of the same size, as rotary positions depend on it, and a narrower row."""
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    kept = min(heads, HEADS)
    size = values.get("head_dim") or hidden // heads
    values["hidden_size"] = kept * size if heads * size == hidden else min(WIDTH, hidden)
    key_heads = values.get("num_key_value_heads")
    if isinstance(key_heads, int) and heads > HEADS:
        values["num_key_value_heads"] = kept if key_heads == heads else 1
    values["num_attention_heads"] = kept


def find_difference(model: Any, max_seq_len: int) -> str:
    """How a packed row differs from its documents alone, or "" where it does not.

    Raises AttentionError where attention is asked for what packed attention does not compute.
    """
    examples = random_examples(model)
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


def random_examples(model: Any) -> list[Example]:
    """Documents of random tokens, all of them supervised."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rng = np.random.default_rng(0)
    examples = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        examples.append(Example(str(number), ids, np.concatenate([[IGNORE], ids[1:]])))
    return examples


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
