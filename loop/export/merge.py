"""The adapter folded into its base: an ordinary model folder that transformers and vLLM load, `./launch.sh merge --adapter DIR --out DIR`.

The base goes by tensor by tensor, so memory holds a file's worth of it at a time, however large it is. PEFT says which matrices are adapted and
what W + B A scale is, transformers which of them NF4 quantises; both look at a model without weights (on torch's meta device).
"""

import json
import shutil
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from peft import LoraConfig, get_peft_model, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

from ..config.schema import ConfigError
from ..distributed.files import atomic_folder
from ..model.loading import loading, resolve_base
from ..model.quantization import nf4_config
from ..zero3.optimizer_state import FILE_BYTES
from .audit import check_adapter

WAYS, INDEX = ("16bit", "nf4"), "model.safetensors.index.json"
BESIDE = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
]  # a base's files, apart from its weights, that go along


def find_base(base: str, revision: str | None) -> tuple[Path, dict, dict[str, str]]:
    """(folder, config.json, the file of each tensor by name). Raises ConfigError for a base that has no plain 16- or 32-bit safetensors."""
    with loading(base):
        place = resolve_base(base)["pretrained_model_name_or_path"]
        folder = (
            Path(place)
            if Path(place).is_dir()
            else Path(
                snapshot_download(
                    place,
                    revision=revision,
                    allow_patterns=[*BESIDE, "*.safetensors"],
                    ignore_patterns=["*/*"],
                )
            )
        )
        config = json.loads((folder / "config.json").read_text())
    if quantised := config.get("quantization_config"):
        raise ConfigError(
            f"base={base}: is stored quantised ({quantised.get('quant_method', 'unknown')}), so there is nothing to add to; name "
            "the 16-bit model that it was made from with --base"
        )
    files = (
        json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else {}
    )
    if not files and not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"base={base}: {folder} has no model.safetensors; weights in other formats are not read"
        )
    if absent := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise ConfigError(f"base={base}: {folder} lacks {absent[0]}, which its index names")
    if not files:
        with loading(base), safe_open(folder / "model.safetensors", "pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    return folder, config, files


def adapted_layers(
    adapter: str, base: Path, double_quant: bool
) -> tuple[dict[str, LoraLayer], set[str], str]:
    """(PEFT's layer of each adapted weight by the weight's name, names of the weights that NF4 quantises, the model's class).

    Raises ConfigError for an adapter that is more than B A on linear layers, or does not fit."""
    lora = LoraConfig.from_pretrained(adapter)
    for key, plain in {
        "modules_to_save": None,
        "bias": "none",
        "use_dora": False,
        "trainable_token_indices": None,
    }.items():
        if getattr(lora, key, plain) not in (plain, [], {}):
            raise ConfigError(
                f"--adapter {adapter}: {key}={getattr(lora, key)} changes more than B A can; only plain LoRA is merged"
            )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base), dtype=torch.bfloat16
        )
    AutoHfQuantizer.from_config(
        nf4_config(torch.bfloat16, double_quant), pre_quantized=False
    ).preprocess_model(model=model, device_map={"": "cpu"})
    quantised = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    weights, layers = load_peft_weights(adapter, device="cpu"), {}
    try:
        model = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(
            f"--adapter {adapter}: does not fit this base ({str(error).splitlines()[0][:160]})"
        ) from error
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            layers[f"{name.removeprefix('base_model.model.')}.weight"] = layer
            for part in ("lora_A", "lora_B"):
                matrix, key = getattr(layer, part), f"{name}.{part}.weight"
                if (
                    "default" not in matrix
                    or key not in weights
                    or weights[key].shape != matrix["default"].weight.shape
                ):
                    raise ConfigError(
                        f"--adapter {adapter}: {key} is missing, not of a linear layer, or of another shape than this base's"
                    )
                # in fp32, as else PEFT rounds B A before it is added, and the sum once more
                matrix["default"].weight = torch.nn.Parameter(
                    weights.pop(key).float(), requires_grad=False
                )
    if weights:
        raise ConfigError(f"--adapter {adapter}: {sorted(weights)[0]} has no place in this base")
    return layers, quantised, type(model.get_base_model()).__name__


@torch.no_grad()
def merged_tensor(
    weight: torch.Tensor, layer: LoraLayer | None, double_quant: bool | None, device
) -> torch.Tensor:
    """W + B A scale in bf16; W as the loop loads it, in bf16 or, with double_quant not None, once through NF4. Added in fp32."""
    weight = weight.to(device, torch.bfloat16)
    if double_quant is not None:
        weight = dequantize_4bit(
            *quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=double_quant)
        )
    if layer is not None:
        delta = layer.get_delta_weight("default")  # type: ignore[attr-defined]  # PEFT declares it on each kind of layer, not on their base
        weight = (weight.float() + delta.to(device)).to(torch.bfloat16)
    return weight.cpu().contiguous()


def merge(
    adapter: str, out: str, base: str | None = None, into: str = "16bit", device="cpu"
) -> Path:
    """Writes the merged model to `out`, in bf16, with the base's tokenizer and other files, and the chat template of the training.
    into="16bit" merges into the base as published; into="nf4" into the dequantised 4-bit base, the one that the adapter was trained
    against (peft#2105): the first is another model by the quantisation error, the second by one rounding to bf16. Raises ConfigError for
    folders that are not what they should be, AuditError for an adapter that is not what was trained."""
    trained = check_adapter(adapter, base)
    base, revision, double_quant = (
        base or trained["base"],
        trained["revision"],
        trained["double_quant"],
    )
    folder, config, files = find_base(base, revision)
    layers, quantised, kind = adapted_layers(adapter, folder, double_quant)
    if absent := sorted(layers.keys() - files.keys()):
        why = (
            "shares it with the embeddings"
            if config.get("tie_word_embeddings")
            else "stores its weights under other names"
        )
        raise ConfigError(
            f"--adapter {adapter}: adapts {absent[0]}, which {base} has not: it {why}; such an adapter can't be merged"
        )
    sizes = {}
    for name, file in files.items():
        with safe_open(folder / file, "pt") as opened:
            part = opened.get_slice(name)
            sizes[name] = 2 * torch.Size(part.get_shape()).numel()
            if part.get_dtype() not in ("BF16", "F16", "F32") and name in layers.keys() | quantised:
                raise ConfigError(
                    f"base={base}: {name} is stored as {part.get_dtype()}; name a 16-bit model with --base"
                )
    total = sum(sizes.values())
    most = max(
        FILE_BYTES, total // (config.get("num_hidden_layers") or 1)
    )  # in memory at a time: of a large model about a layer
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )
    with atomic_folder(Path(out)) as aside:
        if (free := shutil.disk_usage(aside).free) < total:
            raise ConfigError(
                f"--out {out}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
        for shard, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                with safe_open(folder / files[name], "pt") as opened:
                    tensor = opened.get_tensor(name)
                through_nf4 = double_quant if into == "nf4" and name in quantised else None
                tensors[name] = (
                    merged_tensor(tensor, layers.get(name), through_nf4, device)
                    if tensor.is_floating_point()
                    else tensor.clone()
                )
            save_file(tensors, aside / shard, metadata={"format": "pt"})
        if shards.is_sharded:
            (aside / INDEX).write_text(
                json.dumps(
                    {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}, indent=2
                )
            )
        for path in (
            path for pattern in BESIDE for path in folder.glob(pattern) if path.name != INDEX
        ):
            shutil.copyfile(path, aside / path.name)
        # older transformers, and with it vLLM, read torch_dtype; newer ones dtype
        config = {
            key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map")
        }
        config |= {
            "architectures": config.get("architectures") or [kind],
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
        (aside / "config.json").write_text(json.dumps(config, indent=2))
        template = (
            AutoTokenizer.from_pretrained(adapter).chat_template
            if (Path(adapter) / "tokenizer_config.json").is_file()
            else None
        )
        if (
            template and template != AutoTokenizer.from_pretrained(folder).chat_template
        ):  # the base has none: the project's was trained with
            (aside / "chat_template.jinja").write_text(template)
    return Path(out)
