"""An adapter folded into its base: an ordinary model folder that transformers and vLLM load.

The base is read, merged and written one file of the result at a time, so memory holds no more than
that, however large the base is. PEFT says which weights are adapted and what W + B A scale is,
transformers which of them a quantisation takes. Both look at a model without weights (on torch's
meta device).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from peft import LoraConfig, get_peft_model, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import AutoHfQuantizer

from ..config.schema import ConfigError
from ..distributed.files import atomic_folder
from ..distributed.progress import track
from ..kernels.quantization import QUANTIZATIONS, Quantization
from ..model.loading import NO_CODE, config_errors_for, resolve_base
from ..model.lora import check_patterns
from ..untrusted.bases import check_base_folder, read_model_config
from ..zero3.optimizer_state import FILE_BYTES
from .audit import check_adapter
from .card import TRAINED, check_card, write_papers

# What an adapter is merged into: the base as published, or its dequantised weights.
WAYS = ("16bit", *QUANTIZATIONS)
INDEX = "model.safetensors.index.json"
# A base's files that go along, apart from its weights.
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
# Fields of LoraConfig that are more than plain LoRA, unless they have this value or are empty.
PLAIN_LORA = {
    "modules_to_save": None,
    "bias": "none",
    "use_dora": False,
    "trainable_token_indices": None,
}


@dataclass(frozen=True)
class StoredBase:
    """A base's folder of plain safetensors."""

    name: str  # as the adapter or the user gave it, for messages
    folder: Path
    config: dict[str, Any]  # config.json
    files: dict[str, str]  # the file of each tensor

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class AdaptedLayers:
    """What PEFT and transformers say of an adapter's base. Names are those in the base's files."""

    lora: dict[str, LoraLayer]  # of each adapted weight, in fp32 on the CPU
    quantized: set[str]  # weights that a quantisation takes
    architecture: str  # the model's class


def merge(
    adapter: str, out: str, base: str | None = None, into: str = "16bit", device="cpu"
) -> Path:
    """Writes the merged model to `out`, in bf16, and returns that folder.

    The folder also has the base's tokenizer and other files, the chat template of the training, a
    model card, and a Modelfile for Ollama. Nothing is left of it when something goes wrong.

    Args:
        adapter: a folder that PEFT loads.
        out: a folder that is new or empty.
        base: the base, where it is not the one that the adapter names.
        into: "16bit" merges into the base as published; a quantisation's name into the dequantised
            base, the one that the adapter was trained against (peft#2105). Against the trained
            model, the first differs by the quantisation error, the second by a rounding to bf16.
        device: where the sums are computed.

    Raises ConfigError for folders that are not what they should be, AuditError for an adapter that
    is not what was trained, OSError and SafetensorError when nothing can be written.
    """
    trained = check_adapter(adapter, base)
    check_card(f"--adapter {adapter}", Path(adapter), trained)
    double_quant = trained["double_quant"]
    # Which weights are quantised matters for the 16-bit base as well: they must be 16-bit there.
    quantization = QUANTIZATIONS["nf4" if into == "16bit" else into]
    source = find_base(base or trained["base"], trained["revision"])
    adapted = load_adapted_layers(adapter, source, quantization, double_quant)
    check_names(adapter, source, adapted)
    sizes = merged_sizes(source, adapted)
    shards = plan_files(sizes, source.config)

    def merged(name: str) -> torch.Tensor:
        tensor = source.read(name)
        if not tensor.is_floating_point():
            return tensor.clone()
        through = quantization if into != "16bit" and name in adapted.quantized else None
        return merge_tensor(tensor, adapted.lora.get(name), through, double_quant, device)

    with atomic_folder(Path(out)) as folder:
        check_free_space(out, folder, sum(sizes.values()))
        for file, names in track(list(shards.filename_to_tensors.items()), "merging", "files"):
            # Without a name for the tensors: they must be freed before the next file's are made.
            save_file(
                {name: merged(name) for name in names}, folder / file, metadata={"format": "pt"}
            )
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        copy_other_files(source, folder)
        write_config(source, adapted.architecture, folder)
        write_chat_template(adapter, source, folder)
        write_papers(folder, trained_of_merged(trained, source.name, into))
    return Path(out)


# ---- what is read


def find_base(base: str, revision: str | None) -> StoredBase:
    """The base's files, downloaded if need be.

    Raises ConfigError for a base that has no plain safetensors, or not all that its index names.
    """
    with config_errors_for(base):
        location = resolve_base(base, revision)["pretrained_model_name_or_path"]
        if Path(location).is_dir():
            folder = Path(location)
        else:
            folder = download_base(location, revision)
    check_base_folder(base, folder)
    config = json.loads((folder / "config.json").read_text())
    if stored := config.get("quantization_config"):
        raise ConfigError(
            f"base={base}: is stored quantised ({stored.get('quant_method', 'unknown')}), so there "
            "is nothing to add to; name the 16-bit model that it was made from with --base"
        )
    return StoredBase(base, folder, config, find_tensors(base, folder))


def download_base(hub_id: str, revision: str | None) -> Path:
    """The folder with the weights and other files of a model of the hub."""
    return Path(
        snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=[*OTHER_FILES, "*.safetensors", "README.md"],
            ignore_patterns=["*/*"],
        )
    )


def find_tensors(base: str, folder: Path) -> dict[str, str]:
    """The file of each tensor of a base, by the tensor's name. Raises ConfigError."""
    files: dict[str, str] = {}
    if (folder / INDEX).is_file():
        files = json.loads((folder / INDEX).read_text())["weight_map"]
    if not files and not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"base={base}: {folder} has no model.safetensors; weights in other formats are not read"
        )
    absent = sorted({file for file in files.values() if not (folder / file).is_file()})
    if absent:
        raise ConfigError(f"base={base}: {folder} lacks {absent[0]}, which its index names")
    if files:
        return files
    with config_errors_for(base), safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def load_adapted_layers(
    adapter: str, base: StoredBase, quantization: Quantization, double_quant: bool
) -> AdaptedLayers:
    """The adapter's matrices in PEFT's layers, and which of the base's weights are quantised.

    Raises ConfigError for an adapter that is more than B A on linear layers, or does not fit.
    """
    lora_config = LoraConfig.from_pretrained(adapter)
    check_plain_lora(adapter, lora_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            read_model_config(NO_CODE | {"pretrained_model_name_or_path": base.folder}, None),
            dtype=torch.bfloat16,
            **NO_CODE,
        )
    quantizer = AutoHfQuantizer.from_config(
        quantization.transformers_config(torch.bfloat16, double_quant), pre_quantized=False
    )
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    quantized = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if quantization.is_quantized(module)
    }
    stored = stored_names(model, base)
    try:
        check_patterns(model, lora_config.to_dict())
        model = get_peft_model(model, lora_config)
    except Exception as error:  # PEFT raises anything at a configuration that is broken
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(f"--adapter {adapter}: does not fit this base ({reason})") from error
    lora = {
        stored.get(name, name): layer for name, layer in load_lora_weights(adapter, model).items()
    }
    quantized = {stored.get(name, name) for name in quantized}
    return AdaptedLayers(lora, quantized, type(model.get_base_model()).__name__)


def stored_names(model, base: StoredBase) -> dict[str, str]:
    """The name in the base's files of each of the model's weights, as transformers renames them."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    names = model.state_dict()
    return {
        rename_source_key(stored, renamings, [], model.base_model_prefix, names)[0]: stored
        for stored in base.files
    }


def check_plain_lora(adapter: str, lora_config: LoraConfig) -> None:
    """Raises ConfigError for an adapter that changes more than B A can."""
    for key, plain in PLAIN_LORA.items():
        value = getattr(lora_config, key, plain)
        if value not in (plain, [], {}):
            raise ConfigError(
                f"--adapter {adapter}: {key}={value} changes more than B A can; only plain LoRA is "
                "merged"
            )


def load_lora_weights(adapter: str, model) -> dict[str, LoraLayer]:
    """Fills the LoRA layers of a PEFT model with an adapter's matrices, in fp32.

    In another dtype PEFT would round B A before it is added, and the sum once more. Returns the
    layer of each adapted weight by the weight's name. Raises ConfigError when the adapter has more
    or fewer matrices than the model, or of other shapes.
    """
    weights = load_peft_weights(adapter, device="cpu")
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        layers[f"{name.removeprefix('base_model.model.')}.weight"] = layer
        for part in ("lora_A", "lora_B"):
            matrices = getattr(layer, part)
            key = f"{name}.{part}.weight"
            fits = (
                "default" in matrices
                and key in weights
                and weights[key].shape == matrices["default"].weight.shape
                and bool(weights[key].isfinite().all())
            )
            if not fits:
                raise ConfigError(
                    f"--adapter {adapter}: {key} is missing, not of a linear layer, of another "
                    "shape than this base's, or holds no finite numbers"
                )
            matrices["default"].weight = torch.nn.Parameter(
                weights.pop(key).float(), requires_grad=False
            )
    if weights:
        raise ConfigError(f"--adapter {adapter}: {sorted(weights)[0]} has no place in this base")
    return layers


def check_names(adapter: str, base: StoredBase, adapted: AdaptedLayers) -> None:
    """Raises ConfigError where the adapter adapts a weight that the base's files don't have."""
    absent = sorted(adapted.lora.keys() - base.files.keys())
    if not absent:
        return
    if base.config.get("tie_word_embeddings") and ".layers." not in absent[0]:
        why = "shares it with the embeddings"
    else:
        why = "stores its weights under other names"
    raise ConfigError(
        f"--adapter {adapter}: adapts {absent[0]}, which {base.name} has not: it {why}; such an "
        "adapter can't be merged"
    )


# ---- what is computed


@torch.no_grad()
def merge_tensor(
    weight: torch.Tensor,
    layer: LoraLayer | None,
    quantization: Quantization | None,
    double_quant: bool,
    device,
) -> torch.Tensor:
    """W + B A scale, added in fp32 on device; bf16 on the CPU.

    W is what the loop loads: the weight in bf16, or that once through the quantisation.
    """
    weight = weight.to(device, torch.bfloat16)
    if quantization:
        weight = quantization.round_trip(weight, double_quant)
    if layer is not None:
        # PEFT declares it on each kind of layer, not on their base class.
        delta = layer.get_delta_weight("default")  # type: ignore[attr-defined]
        weight = (weight.float() + delta.to(device)).to(torch.bfloat16)
    return weight.cpu().contiguous()


# ---- what is written


def merged_sizes(base: StoredBase, adapted: AdaptedLayers) -> dict[str, int]:
    """Bytes of each tensor in bf16, by name. Reads no weights.

    Raises ConfigError where a linear layer's weight is not stored as a plain number.
    """
    sizes = {}
    computed = adapted.lora.keys() | adapted.quantized
    for name, file in base.files.items():
        with safe_open(base.folder / file, "pt") as opened:
            tensor = opened.get_slice(name)
            sizes[name] = 2 * torch.Size(tensor.get_shape()).numel()
            if tensor.get_dtype() not in ("BF16", "F16", "F32") and name in computed:
                raise ConfigError(
                    f"base={base.name}: {name} is stored as {tensor.get_dtype()}; name a 16-bit "
                    "model with --base"
                )
    return sizes


def plan_files(sizes: dict[str, int], config: dict):
    """Which tensors go to which file of the merged model, as transformers names the files.

    A file is what memory holds at a time: of a large model about a layer.
    """
    num_layers = config.get("num_hidden_layers") or 1
    return split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max(FILE_BYTES, sum(sizes.values()) // num_layers),
    )


def check_free_space(out: str, folder: Path, needed: int) -> None:
    """Raises ConfigError where the folder's disk has less than `needed` bytes. out: for messages"""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"--out {out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def copy_other_files(base: StoredBase, folder: Path) -> None:
    """Copies the base's tokenizer, licence and the like."""
    for pattern in OTHER_FILES:
        for path in base.folder.glob(pattern):
            if path.name not in (INDEX, TRAINED):
                shutil.copyfile(path, folder / path.name)


def trained_of_merged(trained: dict[str, Any], base: str, into: str) -> dict[str, Any]:
    """The content of trained.json for a merged model. base, into: as `merge` got them.

    trained: of its adapter. The hash of its weights has another name, as it is not the model's.
    """
    described = {key: value for key, value in trained.items() if key != "sha256"}
    if "sha256" in trained:
        described["adapter_sha256"] = trained["sha256"]
    return described | {"base": base, "merged_into": into, "dtype": "bfloat16"}


def write_config(base: StoredBase, architecture: str, folder: Path) -> None:
    """Writes config.json: the base's own, in bf16. architecture: for a base that names none."""
    config = {
        key: value for key, value in base.config.items() if key not in ("_name_or_path", "auto_map")
    }
    # Older transformers, and with it vLLM, read torch_dtype; newer ones dtype.
    config |= {
        "architectures": config.get("architectures") or [architecture],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_chat_template(adapter: str, base: StoredBase, folder: Path) -> None:
    """Writes the chat template of the training, where it is not the base's.

    A base without one was trained with the project's.
    """
    if not (Path(adapter) / "tokenizer_config.json").is_file():
        return
    template = AutoTokenizer.from_pretrained(adapter, **NO_CODE).chat_template
    if template and template != AutoTokenizer.from_pretrained(base.folder, **NO_CODE).chat_template:
        (folder / "chat_template.jinja").write_text(template)
