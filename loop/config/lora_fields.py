"""The section `lora`: fields of peft.LoraConfig, each checked by its type before PEFT gets it."""

import dataclasses
import math
import re
import typing
import warnings
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .error_text import first_line

HIGHEST_RANK = 2**14
# What the loop itself tells PEFT, or what no run can use.
NOT_FOR_A_RUN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "runtime_config", "megatron_config", "megatron_core",
}  # fmt: skip

# What the loop computes, merges and proves. PEFT's other fields are variants of LoRA.
COMPUTED = frozenset(
    """r lora_alpha lora_dropout use_rslora bias lora_bias fan_in_fan_out init_lora_weights
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern rank_pattern
    alpha_pattern""".split()
)


def check_lora(lora: dict[str, Any]) -> dict[str, Any]:
    """The fields, with a number where YAML read a text. Raises ValueError naming the field."""
    from peft import LoraConfig  # late: it takes seconds, which a mistyped key need not wait

    known = {f.name for f in dataclasses.fields(LoraConfig)}
    for key in lora:
        if key not in known:
            raise ValueError(f"unknown field {key[:60]!r} of peft.LoraConfig")
        if key in NOT_FOR_A_RUN:
            raise ValueError(f"{key} is set by the loop; leave it out")
    if isinstance(lora.get("lora_dropout"), str):  # YAML reads 1e-1 as a text
        with_number = TypeAdapter(float).validate_python  # its error is one line
        try:
            lora = lora | {"lora_dropout": with_number(lora["lora_dropout"])}
        except ValidationError as error:
            raise ValueError("lora_dropout must be a number") from error
    rank = lora.get("r", 8)
    if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
        raise ValueError(f"r must be a whole number of at least 1, and at most {HIGHEST_RANK}")
    dropout = lora.get("lora_dropout", 0)
    alpha = lora.get("lora_alpha", 16)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError("lora_dropout must lie in [0, 1)")
    if not _is_number(alpha) or not math.isfinite(alpha):
        raise ValueError("lora_alpha must be a number")
    # DoRA needs the norm of the dense weight, and PiSSA, OLoRA, LoftQ and EVA rewrite it. A
    # partitioned 4-bit base offers neither.
    if lora.get("use_dora"):
        raise ValueError("use_dora does not work on a partitioned 4-bit base; leave it out")
    if lora.get("trainable_token_indices"):
        raise ValueError(
            "trainable_token_indices needs the whole embedding on one rank; leave it out"
        )
    if lora.get("target_parameters"):
        raise ValueError(
            "target_parameters: tensors get no LoRA here; leave it out, and name linear layers in "
            "target_modules"
        )
    for key in sorted(lora.keys() - COMPUTED):
        if lora[key]:  # an unset field of a copied adapter_config.json does no harm
            raise ValueError(f"{key} is a variant of LoRA that the loop has not; leave it out")
    initial = lora.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={str(initial)[:60]!r} rewrites the base, which stays frozen here"
        )
    _check_types(lora, LoraConfig)
    _check_patterns(lora)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LoraConfig(task_type="CAUSAL_LM", **lora)
    except Exception as error:  # PEFT raises anything at a field that does not fit
        raise ValueError(f"peft.LoraConfig refuses it: {first_line(error, 160)}") from error
    return lora


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_types(lora: dict[str, Any], lora_config: type) -> None:
    hints = typing.get_type_hints(lora_config)
    for key, value in lora.items():
        if key in ("lora_alpha", "lora_dropout"):
            continue  # checked above; PEFT computes with a fraction of either
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            what = error.errors(include_url=False)[0]["msg"]
            raise ValueError(f"{key}={str(value)[:60]!r}: {what}") from error


def _check_patterns(lora: dict[str, Any]) -> None:
    """Names of modules may be regular expressions; of a rank pattern the ranks are checked, too."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(lora.get(key), str):
            _compile(key, lora[key])
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (lora.get(key) or {}).items():
            _compile(key, pattern)
            whole = key == "rank_pattern"
            if not _is_number(value) or not 0 < value <= (HIGHEST_RANK if whole else 1e9):
                raise ValueError(f"{key}: {pattern[:60]!r}: {str(value)[:60]!r} is no such number")
            if whole and type(value) is not int:
                raise ValueError(f"{key}: {pattern[:60]!r}: {value} is not a whole number")


def _compile(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key}: {pattern[:60]!r} is no regular expression ({error})") from error
