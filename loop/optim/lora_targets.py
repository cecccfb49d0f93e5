"""Which layers of a base get LoRA, as PEFT's configuration."""

import re
from typing import Any

import torch
import torch.nn as nn
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from ..config.error_text import first_line
from ..config.schema import ConfigError


def put_lora(model: Any, lora: dict[str, Any]) -> PeftModel:
    """The model with new LoRA weights, which the caller draws at random. Raises ConfigError.

    `target_modules: all-linear` means the linear layers of the language model's decoder layers.
    Experts that a family stores as one tensor are no linear layers and stay as they are. So do the
    layers that see images.
    """
    targets = lora.get("target_modules")
    try:
        if targets == "all-linear" and (has_fused_experts(model) or sees_images(model)):
            targets = without_renamed(linear_names(model), model)
        lora_config = LoraConfig(task_type="CAUSAL_LM", **{**lora, "target_modules": targets})
        names = [name for name, _ in model.named_modules()]
        peft_model = get_peft_model(model, lora_config, autocast_adapter_dtype=False)
        tuner: Any = peft_model.base_model
        check_names(lora, names, tuner.targeted_module_names)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT raises anything at a field that does not fit
        kind = re.match(r"Target module (\w+)\(.*is not supported", str(error), re.DOTALL)
        if kind:
            raise ConfigError(
                f"lora.target_modules: {str(targets)[:60]!r} fits a {kind[1]} too, which gets no "
                "LoRA; name linear layers alone, such as q_proj, or take all-linear"
            ) from error
        raise ConfigError(f"lora: {first_line(error)}") from error
    if lora_config.target_parameters:
        raise ConfigError(
            "lora.target_modules: names experts that are stored as one tensor, which get no LoRA "
            "here; take all-linear (attention and shared experts), or name other layers"
        )
    lora_config.target_parameters = None  # PEFT leaves an empty set, which JSON does not know
    output_layer = model.get_output_embeddings()
    if hasattr(output_layer, "lora_A") and lora.get("lora_dropout"):
        raise ConfigError(
            "lora.lora_dropout: must be 0 with LoRA on the output layer, which sees supervised "
            "tokens alone; set it to 0, or leave the output layer out of lora.target_modules"
        )
    return peft_model


def check_names(lora: dict[str, Any], modules: list[str], targeted: list[str]) -> None:
    """Raises ConfigError where a name, a pattern or a layer's number in `lora` fits no module.

    PEFT would train without it, and say nothing.

    Args:
        modules: the names of the base's modules.
        targeted: of those with LoRA.
    """
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        named = lora.get(key) or []
        for name in [] if isinstance(named, str) and key == "target_modules" else _listed(named):
            pattern = name if isinstance(named, str) else rf"(.*\.)?{re.escape(name)}"
            _check_found(key, name, pattern, modules, "the base")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:  # as PEFT's get_pattern_key reads it
            _check_found(key, pattern, rf"(.*\.)?({pattern})", targeted, "lora.target_modules")
    for layer in _listed(lora.get("layers_to_transform")):
        pattern = rf"(.*\.)?{layer}\..*"
        _check_found("layers_to_transform", layer, pattern, targeted, "lora.target_modules")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, (str, int)) else list(value)


def _check_found(key: str, given: Any, pattern: str, names: list[str], where: str) -> None:
    if not any(re.fullmatch(pattern, name) for name in names):
        example = f", which has {names[-1]}" if names else ""
        raise ConfigError(
            f"lora.{key}: {str(given)[:60]!r} fits no module of {where}{example}; "
            "correct it, or leave it out"
        )


def without_renamed(names: list[str], model: nn.Module) -> list[str]:
    """The names without those that PEFT takes for experts of older versions of transformers.

    In some families (DeepSeek-V3) it means the experts by `gate_proj` wherever that stands, so
    their shared experts get no LoRA.
    """
    probe = LoraConfig(task_type="CAUSAL_LM", target_modules=names)
    convert_peft_config_for_transformers(probe, model, None)
    return sorted(probe.target_modules or ())


def has_fused_experts(model: nn.Module) -> bool:
    """Whether a layer stores all experts of a mixture in one tensor."""
    return count_expert_weights(model) > 0


def count_expert_weights(model: nn.Module) -> int:
    """The weights of experts that are stored as one tensor, [experts, out, in]."""
    return sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in model.named_parameters()
        if "expert" in name and len(getattr(p, "ds_shape", p.shape)) == 3
    )


def sees_images(model: Any) -> bool:
    """Whether the model has a language model beside other parts."""
    return model.config.get_text_config(decoder=True) is not model.config


def linear_names(model: Any) -> list[str]:
    """The names of the linear layers in the language model's decoder layers."""
    layers = set(model.get_decoder().layers.modules())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in layers
    ]
