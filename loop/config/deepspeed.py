"""DeepSpeed's side of the configuration: one owner for each key.

ds_config.json owns the ZeRO stage, buckets, precision, communication and parameter offload; the
run's YAML owns everything else. A key that stood in both would have to be changed in both places,
so it is refused here. So is what would give wrong numbers silently.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .cli import describe_first_mistake, printable, shortened
from .device import has_fast_bf16
from .error_text import first_line
from .plain_yaml import read_small_file
from .schema import ROOT, Config, ConfigError

OWNED_BY_THE_RUN = {  # DeepSpeed's key -> the keys of the run's configuration
    "optimizer": "lr, betas, eps, weight_decay",
    "scheduler": "lr, warmup_steps, restart_steps",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
}
# DeepSpeed takes any other key in silence, and does nothing with it.
KNOWN = {
    "activation_checkpointing", "aio", "allgather_size", "amp", "autotuning", "bf16",
    "checkpoint", "comet", "comms_logger", "communication_data_type", "compile",
    "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "data_types",
    "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state", "elasticity",
    "expert_parallel", "flops_profiler", "fp16", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown", "optimizer",
    "prescale_gradients", "progressive_layer_drop", "quantize_training", "scheduler",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
SECTIONS = {
    "aio", "amp", "autotuning", "bf16", "checkpoint", "comet", "comms_logger", "compile",
    "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "data_types",
    "elasticity", "expert_parallel", "flops_profiler", "fp16", "hybrid_engine", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "wandb", "zero_optimization",
}  # fmt: skip
SWITCHES = {
    "disable_allgather", "disable_python_gc", "dump_state", "memory_breakdown",
    "prescale_gradients", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip
# What would change the model, its data or its numbers behind the loop's back, where it is on.
NOT_THE_LOOPS = frozenset(
    "amp autotuning compile compression_training curriculum_learning data_efficiency elasticity "
    "expert_parallel hybrid_engine progressive_layer_drop quantize_training sparse_attention "
    "sparse_gradients tensor_parallel torch_autocast weight_quantization".split()
)
# The loop counts tokens, and sets the accumulation boundary itself. Left out, DeepSpeed would clip
# at 1.0 after our own clipping.
OURS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
}
MOST = 2**62  # of a number
DTYPES = ("fp32", "fp16", "bf16")
AUTO = {"enabled": "auto"}  # of bf16
QUANTIZED_WEIGHTS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def build_ds_config(config: Config, for_gpus: bool = False) -> dict[str, Any]:
    """The dict that transformers and `deepspeed.initialize` get: the JSON, completed.

    `"bf16": {"enabled": "auto"}` becomes what this machine computes well in, see `has_fast_bf16`;
    with for_gpus it is true, as on every GPU. Raises ConfigError naming the key that does not
    belong in the JSON, or that can't work.
    """
    path = ROOT / config.deepspeed  # an absolute path stays as it is
    try:
        ds_config = json.loads(read_small_file(path), object_pairs_hook=_with_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or printable(str(error).splitlines()[0])
        if isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8: save it so"
        raise ConfigError(f"deepspeed={printable(config.deepspeed)}: {reason}") from error
    if not isinstance(ds_config, dict):
        raise ConfigError(f"{path.name}: must hold one JSON object")
    if ds_config.get("bf16") == AUTO:
        ds_config["bf16"] = {"enabled": for_gpus or has_fast_bf16()}
    _check_owners(ds_config, path)
    _check_types(ds_config, path)
    _check_numbers(ds_config, path, config)
    check_sections(ds_config, path)
    # Left out, the throughput timer waits for the GPU before each micro-batch.
    timers = ds_config.get("timers", {"throughput": {"enabled": False}})
    return {**ds_config, **OURS, "timers": timers}


def _check_owners(ds_config: dict[str, Any], path: Path) -> None:
    for key, ours in OWNED_BY_THE_RUN.items():
        if key in ds_config:
            raise ConfigError(
                f"{path.name}: {key} is set by the run's configuration ({ours}); remove it from "
                "the JSON"
            )
    if '"auto"' in json.dumps(ds_config):
        raise ConfigError(
            f'{path.name}: "auto" stands for bf16.enabled alone; write the value of this key'
        )


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, _ in pairs:
        if sum(key == other for other, _ in pairs) > 1:
            raise ValueError(f"the key {key[:60]!r} is there twice")
    return dict(pairs)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """(dotted key, number) of each number in a value."""
    if isinstance(value, (int, float)):
        yield name, value
    elif _is_object(value):
        for key, inner in value.items():
            yield from _numbers(f"{name}.{key}", inner)


def _check_types(ds_config: dict[str, Any], path: Path) -> None:
    """Refuses unknown keys, and values that are not of DeepSpeed's types."""
    for key, value in ds_config.items():
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1)
            hint = f"; is {near[0]} meant?" if near else ""
            raise ConfigError(printable(f"{path.name}: unknown key {key}{hint}"))
        if key in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"{path.name}: {key}={shortened(value)}: must be an object")
        if key in SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"{path.name}: {key}={shortened(value)}: must be true or false")
        if key in NOT_THE_LOOPS and (value.get("enabled", value) if _is_object(value) else value):
            raise ConfigError(
                f"{path.name}: {key}: the loop would not know of it; remove it from the JSON"
            )
        for name, number in _numbers(key, value):
            if not -MOST < number < MOST:
                raise ConfigError(
                    f"{path.name}: {name}={shortened(number)}: must be a smaller number"
                )
    steps = ds_config.get("steps_per_print", 1)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ConfigError(f"{path.name}: steps_per_print={shortened(steps)}: must be 1 or more")
    for section in ("bf16", "fp16", "torch_autocast"):
        enabled = ds_config.get(section, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise ConfigError(
                f"{path.name}: {section}.enabled={shortened(enabled)}: must be true or false"
            )
    dtype = ds_config.get("communication_data_type")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"{path.name}: communication_data_type={shortened(dtype)}: must be one of "
            f"{', '.join(DTYPES)}"
        )
    zero = ds_config.get("zero_optimization", {})
    for key in ("sub_group_size", "zero_hpz_partition_size"):
        if isinstance(zero.get(key), (int, float)) and zero[key] < 1:
            raise ConfigError(
                f"{path.name}: zero_optimization.{key}={shortened(zero[key])}: must be 1 or more"
            )
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key) or {}, dict):
            raise ConfigError(
                f"{path.name}: zero_optimization.{key}={shortened(zero[key])}: must be an object"
            )


def check_sections(ds_config: dict[str, Any], path: Path) -> None:
    """DeepSpeed's own check of all sections. Raises ConfigError with the key and its value."""
    # late: it takes a second
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    checks: dict[str, Callable[[], Any]] = {
        "zero_optimization.": lambda: DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {})),
        "bf16.": lambda: DeepSpeedBF16Config(**ds_config.get("bf16", {})),
        "": lambda: DeepSpeedConfig(ds_config | OURS),
    }
    for section, check in checks.items():
        try:
            parsed = check()
        except ValidationError as error:
            mistake = describe_first_mistake(error)
        except Exception as error:  # DeepSpeed raises anything at a value that does not fit
            mistake = first_line(error)
        else:
            continue
        raise ConfigError(printable(f"{path.name}: {section}{mistake}"))
    offload = parsed.zero_config.offload_optimizer  # older keys mean it as well
    if offload and getattr(offload.device, "value", offload.device) != "none":
        raise ConfigError(
            f"{path.name}: offload_optimizer would leave the gradients on the CPU, where our "
            "clipping gets copies of them only"
        )


def _check_numbers(ds_config: dict[str, Any], path: Path, config: Config) -> None:
    """Refuses what the loop can't compute with, or what would give wrong numbers silently."""
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ConfigError(
            f"{path.name}: zero_optimization.stage must be 3, the loop reads ZeRO-3's partitions"
        )
    wanted = {"gradient_allreduce_op": "mean", "gradient_predivide_factor": 1}
    for key, value in wanted.items():
        if ds_config.get(key, value) != value:
            raise ConfigError(f"{path.name}: {key} must be {value}: the loop divides by itself")
    if ds_config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path.name}: fp16 corrupts packed NF4 weights silently; use bf16")
    if ds_config.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        raise ConfigError(
            f"{path.name}: data_types.grad_accum_dtype must be fp32: clipping scales the "
            "accumulated slices in place"
        )
    for key in QUANTIZED_WEIGHTS:
        if zero.get(key) and config.quantization:
            raise ConfigError(
                f"{path.name}: {key} (qwZ) would round NF4 codes as if they were numbers"
            )
