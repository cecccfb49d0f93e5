"""A 4-bit base loaded straight into its ZeRO-3 shards, one module at a time.

transformers partitions while it loads only what is not quantised; of a quantised base each rank would first hold the whole (35 GB for 70
billion weights) before the engine cuts it up. Here a rank reads the tensors of one module, quantises them, keeps its share and forgets
the rest: at its fullest it holds its shards, the quantisation states, which are never sharded, and one module. Bit for bit it is the
ordinary way's model. All ranks of a machine map the same files, so each byte comes from the disk once a machine.
"""

import json
from pathlib import Path

import bitsandbytes as bnb
import deepspeed
import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import init_empty_weights
from deepspeed.utils import groups
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..config.schema import ConfigError


class SafetensorsReader:
    """The tensors of a folder's safetensors files by name, read one by one."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = {
                name: folder / file
                for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                self.files = dict.fromkeys(file.keys(), folder / "model.safetensors")

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def beside(self, name: str) -> list[str]:
        """What a prequantised weight is saved with: `NAME.absmax` and so on."""
        return [key for key in self.files if key.startswith(f"{name}.")]


def fetch_base(place: str, revision: str | None) -> Path:
    """The folder with the base's configuration and weights: a local one as it is, the hub's after a download, if need be."""
    return (
        Path(place)
        if Path(place).is_dir()
        else Path(
            snapshot_download(place, revision=revision, allow_patterns=["*.json", "*.safetensors"])
        )
    )


def stream_base(
    location: dict, dtype: torch.dtype, device, *, revision, quantization, attention: str, ds: dict
) -> PreTrainedModel | None:
    """The frozen 4-bit base, each of its parameters partitioned over the ranks. location: keyword arguments of `from_pretrained`;
    quantization: a BitsAndBytesConfig, unless the base brings its own; ds: DeepSpeed's configuration. Every rank must call it.

    Returns None, on all ranks, where the files' names are not the model's own (experts that are fused while loading, other kinds of
    quantisation): such a base has to be loaded the ordinary way. Raises ConfigError on all ranks when one of them can't read."""
    folder = fetch_base(location["pretrained_model_name_or_path"], revision)
    config = AutoConfig.from_pretrained(**location, revision=revision)
    prequantized = getattr(config, "quantization_config", None)
    try:
        weights = SafetensorsReader(folder)
        quantizer = AutoHfQuantizer.from_config(
            prequantized or quantization, pre_quantized=prequantized is not None
        )
    except (OSError, SafetensorError, ValueError, KeyError, ImportError):
        return None  # the ordinary way says what is wrong
    if not getattr(quantizer.quantization_config, "load_in_4bit", False):
        return None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    tied = set(model.all_tied_weights_keys)
    wanted = {name for name, _ in model.named_parameters()} - tied
    if not wanted <= weights.files.keys():
        return None
    for prefix, module in model.named_modules():
        own = [
            name
            for name, _ in module.named_parameters(recurse=False)
            if f"{prefix}.{name}".lstrip(".") in wanted
        ]
        if own:
            fill_module(
                module,
                {name: f"{prefix}.{name}".lstrip(".") for name in own},
                weights,
                dtype,
                device,
            )
            hpz = (
                groups._get_zero_param_intra_parallel_group()
            )  # none at first, and without zero_hpz_partition_size
            deepspeed.zero.Init(
                module=module, config_dict_or_path=ds, zero_param_parallel_group=hpz
            )
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    quantizer.postprocess_model(model)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()


def fill_module(
    module: nn.Module, names: dict[str, str], weights: SafetensorsReader, dtype: torch.dtype, device
) -> None:
    """Gives the module its parameters, whole; names: its own -> the file's. Raises ConfigError on all ranks when one can't read them."""
    try:
        values, problem = {name: weights[full] for name, full in names.items()}, None
        stats = {
            name: {key.removeprefix(f"{full}."): weights[key] for key in weights.beside(full)}
            for name, full in names.items()
        }
    except (OSError, SafetensorError, KeyError) as error:
        problem = str(error).splitlines()[0][:160]
    failed = torch.tensor(float(problem is not None), device=device)
    dist.all_reduce(failed)  # before anybody waits for this rank in a partition
    if failed:
        raise ConfigError(
            f"base: {', '.join(names.values())} can't be read{f' ({problem})' if problem else ' by another rank'}"
        )
    for name, value in values.items():
        empty = getattr(module, name)
        value = value if stats[name] or not value.is_floating_point() else value.to(device, dtype)
        if stats[name]:
            parameter: nn.Parameter = bnb.nn.Params4bit.from_prequantized(
                value, stats[name], device=device, module=module
            )  # type: ignore[arg-type]  # it takes any module
        elif isinstance(empty, bnb.nn.Params4bit):
            parameter = bnb.nn.Params4bit(value, **(vars(empty) | {"requires_grad": False})).to(
                device
            )  # type: ignore[misc]  # its overloads lack it
        else:
            parameter = nn.Parameter(value.to(device), requires_grad=False)
        setattr(module, name, parameter)
