"""DeepSpeed's side of the configuration: one owner for each key.

ds_config.json owns the ZeRO stage, buckets, precision, communication and parameter offload; the
run's YAML owns everything else. A key that stood in both would have to be changed in both places,
so it is refused here. So is what would give wrong numbers silently.
"""

import json
from pathlib import Path
from typing import Any

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
QUANTIZED_WEIGHTS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def build_ds_config(config: Config) -> dict[str, Any]:
    """The dict that transformers and `deepspeed.initialize` get: the JSON, completed.

    Raises ConfigError naming the key that does not belong in the JSON, or that can't work.
    """
    path = ROOT / config.deepspeed  # an absolute path stays as it is
    try:
        ds_config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed={config.deepspeed}: {error}") from error
    if not isinstance(ds_config, dict):
        raise ConfigError(f"{path.name}: must hold one JSON object")
    _check_owners(ds_config, path)
    _check_numbers(ds_config, path, config)
    # Left out, the throughput timer waits for the GPU before each micro-batch.
    timers = ds_config.get("timers", {"throughput": {"enabled": False}})
    return {
        **ds_config,
        # The loop counts tokens, and sets the accumulation boundary itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Left out, DeepSpeed would clip at 1.0 after our own clipping.
        "gradient_clipping": 0.0,
        "timers": timers,
    }


def _check_owners(ds_config: dict[str, Any], path: Path) -> None:
    for key, ours in OWNED_BY_THE_RUN.items():
        if key in ds_config:
            raise ConfigError(
                f"{path.name}: {key} is set by the run's configuration ({ours}); remove it from "
                "the JSON"
            )
    if '"auto"' in json.dumps(ds_config):
        raise ConfigError(f'{path.name}: "auto" is not filled in by anybody here; write the value')


def _check_numbers(ds_config: dict[str, Any], path: Path, config: Config) -> None:
    """Refuses what the loop can't compute with, or what would give wrong numbers silently."""
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ConfigError(
            f"{path.name}: zero_optimization.stage must be 3, the loop reads ZeRO-3's partitions"
        )
    if ds_config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path.name}: fp16 corrupts packed NF4 weights silently; use bf16")
    if ds_config.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        raise ConfigError(
            f"{path.name}: data_types.grad_accum_dtype must be fp32: clipping scales the "
            "accumulated slices in place"
        )
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise ConfigError(
            f"{path.name}: offload_optimizer would leave the gradients on the CPU, where our "
            "clipping gets copies of them only"
        )
    for key in QUANTIZED_WEIGHTS:
        if zero.get(key) and config.quantization:
            raise ConfigError(
                f"{path.name}: {key} (qwZ) would round NF4 codes as if they were numbers"
            )
