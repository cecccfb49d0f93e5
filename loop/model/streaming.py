"""A quantised base loaded straight into its ZeRO-3 shards, one module at a time.

transformers partitions only plain weights while it loads. Each rank would hold all weights of a
quantised base (35 GB for 70 billion) before the engine shards them. Here a rank reads the tensors
of one module, quantises them, keeps its shard and drops the rest. At its peak it holds its shards,
the quantisation states, which are never sharded, and one module. The model is bit for
bit the one that transformers loads. All ranks of a machine map the same files, so each byte comes
from the disk once a machine.
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..config.schema import ConfigError
from ..distributed.progress import Progress, track
from ..kernels.quantization import QUANTIZATIONS, find_quantization
from ..untrusted.bases import check_base_folder, read_model_config
from ..zero3.partition import partition_module


class SafetensorsReader:
    """The tensors of a folder's safetensors files by name, read one by one."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            self.files = {name: folder / file for name, file in weight_map.items()}
        else:
            path = folder / "model.safetensors"
            with safe_open(path, "pt") as file:
                self.files = dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of some tensors, by name."""
        found = {}
        for name in names:
            with safe_open(self.files[name], "pt") as file:
                found[name] = tuple(file.get_slice(name).get_shape())
        return found

    def differ(self, tied: dict[str, str]) -> bool:
        """Whether tensors that the configuration ties are stored as different ones.

        transformers does not tie such. tied: of a model, `all_tied_weights_keys`.
        """
        both = [pair for pair in tied.items() if self.files.keys() >= {*pair}]
        return any(not torch.equal(self[one], self[other]) for one, other in both)

    def holds_codes(self, name: str) -> bool:
        """Whether a tensor was saved in 4 bits: whatever its type, it is no number then."""
        return f"{name}.absmax" in self.files

    def quantization_state(self, name: str) -> dict[str, torch.Tensor]:
        """What a weight that was saved quantised has beside its codes; {} for a plain weight.

        The files name it `NAME.absmax` and so on; the keys here are `absmax` and so on.
        """
        prefix = f"{name}."
        return {key.removeprefix(prefix): self[key] for key in self.files if key.startswith(prefix)}


def fetch_base(base: str, revision: str | None) -> Path:
    """The folder with a base's configuration and weights.

    base: a local folder, which is returned as it is, or a hub id, which is downloaded if need be.
    """
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.json", "*.safetensors", "README.md"]  # the last names the licence
    with Progress(f"downloading {base}", measure=lambda: downloaded_size(base)):
        folder = snapshot_download(base, revision=revision, allow_patterns=patterns)
    return Path(folder)


def downloaded_size(base: str) -> str:
    """What the hub's cache holds of a base, unfinished files included, in GiB."""
    blobs = Path(HF_HUB_CACHE) / f"models--{base.replace('/', '--')}" / "blobs"
    size = 0
    for path in blobs.glob("*"):
        with contextlib.suppress(OSError):  # an unfinished file gets its name meanwhile
            size += path.stat().st_size
    return f"{size / 2**30:.2f} GiB are here"


def stream_base(
    location: dict,
    dtype: torch.dtype,
    device,
    *,
    revision: str | None,
    quantization_config: Any,
    attention: str,
    ds_config: dict,
) -> PreTrainedModel | None:
    """The frozen quantised base, each of its parameters partitioned over the ranks.

    Every rank must call it. Returns None, on all ranks, where the names in the files are not the
    model's own (experts that are fused while loading, a kind of quantisation that is not in
    `QUANTIZATIONS`): such a base has to be loaded by transformers. Raises ConfigError on all ranks
    when one of them can't read.

    Args:
        location: keyword arguments of `from_pretrained`, of `resolve_base`.
        dtype: of the computation, and of weights that are not quantised.
        quantization_config: of transformers; a base that is stored quantised brings its own.
        attention: a name that transformers knows.
    """
    base = location["pretrained_model_name_or_path"]
    folder = fetch_base(base, revision)
    check_base_folder(base, folder)
    model_config = read_model_config(location, revision)
    stored = getattr(model_config, "quantization_config", None)
    try:
        reader = SafetensorsReader(folder)
        quantizer = AutoHfQuantizer.from_config(
            stored or quantization_config, pre_quantized=stored is not None
        )
    except (OSError, SafetensorError, ValueError, KeyError, ImportError):
        return None  # transformers says what is wrong
    if not any(q.describes(quantizer.quantization_config) for q in QUANTIZATIONS.values()):
        return None

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    stored_names = stored_parameters(base, model, reader, plain=stored is None)
    if stored_names is None:
        return None

    modules = list(model.named_modules())
    for prefix, module in track(modules, "quantising the base", "modules"):
        names = own_parameters(prefix, module, stored_names)
        if names:
            fill_module(module, names, reader, dtype, device)
            partition_module(module, ds_config)
    model.tie_weights()
    move_buffers(model, device)
    quantizer.postprocess_model(model)
    if model.can_generate():
        model.generation_config = read_generation_config(folder) or model.generation_config
    return model.requires_grad_(False).eval()


def stored_parameters(
    base: str, model: PreTrainedModel, reader: SafetensorsReader, plain: bool
) -> set[str] | None:
    """The names that all parameters have in the files; None where some are named otherwise.

    plain: the weights are stored as numbers. Raises ConfigError where they have other shapes then.
    """
    tied = model.all_tied_weights_keys
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}
    if not shapes.keys() <= reader.files.keys() or reader.differ(tied):
        return None
    if plain:
        check_shapes(base, shapes, reader.shapes(shapes))
    return {*shapes}


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What generation_config.json says; None where it is absent, or can't be used.

    Its wishes never count, so one that transformers refuses is no reason not to load a base.
    """
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception:  # the library raises anything at a file that it did not expect
        return None


def check_shapes(
    base: str, wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]
) -> None:
    """Raises ConfigError for the first tensor whose stored shape is not the model's."""
    for name, shape in wanted.items():
        if stored.get(name, shape) != shape:
            raise ConfigError(
                f"base={base}: config.json wants {name} as {list(shape)}, and stored is "
                f"{list(stored[name])}: one of the two is of another model"
            )


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raises ConfigError for a stored weight with NaN or infinite numbers, whose loss is NaN.

    Quantising would hide them. A sum is one pass without a copy; only one that is not finite, as
    that of huge numbers may be, is looked into.
    """
    if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
        raise ConfigError(f"{name} holds NaN or infinite numbers; copy the base anew")


def own_parameters(prefix: str, module: nn.Module, stored_names: set[str]) -> dict[str, str]:
    """The parameters that a module itself holds, {name in the module: name in the files}.

    prefix: the module's name in the model; stored_names: of all parameters in the files.
    """
    names = {}
    for name, _ in module.named_parameters(recurse=False):
        stored_name = f"{prefix}.{name}".lstrip(".")
        if stored_name in stored_names:
            names[name] = stored_name
    return names


def fill_module(
    module: nn.Module,
    names: dict[str, str],
    reader: SafetensorsReader,
    dtype: torch.dtype,
    device,
) -> None:
    """Gives a module its own parameters, unsharded, on device. names: of `own_parameters`.

    Every rank must call it. Raises ConfigError on all ranks when one can't read.
    """
    values: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    problem = None
    try:
        for name, stored_name in names.items():
            values[name] = reader[stored_name].to(device)
            states[name] = reader.quantization_state(stored_name)
            if not states[name]:
                check_finite(stored_name, values[name])
    except (OSError, SafetensorError, KeyError, ConfigError) as error:
        own = isinstance(error, ConfigError)
        reason = str(error).splitlines()[0][:160]
        problem = reason if own else f"{', '.join(names.values())} can't be read ({reason})"
    failed = torch.tensor(float(problem is not None), device=device)
    dist.all_reduce(failed)  # before anybody waits for this rank in a partition
    if failed:
        unread = f"{', '.join(names.values())} can't be read by another rank"
        raise ConfigError(f"base: {problem or unread}")
    for name, value in values.items():
        setattr(module, name, make_parameter(module, name, value, states[name], dtype, device))


def make_parameter(
    module: nn.Module,
    name: str,
    value: torch.Tensor,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device,
) -> nn.Parameter:
    """A module's parameter from a tensor of the files, quantised where the module is."""
    if value.is_floating_point() and not state:
        value = value.to(device, dtype)
    quantization = find_quantization(module)
    if quantization and name == "weight":
        return quantization.quantized_parameter(module, value, state, device)
    return nn.Parameter(value.to(device), requires_grad=False)


def move_buffers(model: nn.Module, device) -> None:
    """Moves all buffers of the model to a device."""
    for name, buffer in list(model.named_buffers()):
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner)._buffers[own_name] = buffer.to(device)
