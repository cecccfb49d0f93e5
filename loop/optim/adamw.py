"""The optimizer: AdamW, and the table in which another one can stand.

To add an optimizer, write a function that builds it and add one line to OPTIMIZERS. Checkpoints,
the memory estimate and the configuration's `optimizer` read this table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..config.schema import Config, ConfigError
from ..distributed.world import on_gpu
from ..kernels import check_results


@dataclass(frozen=True)
class OptimizerSpec:
    """What the loop has to know of an optimizer.

    For each weight its state must hold `step`, the number of its updates as a tensor, and for each
    of `state_keys` an fp32 tensor of the weight's shape. ZeRO-3 hands it flat fp32 shards as its
    weights. DeepSpeed accepts a class that it does not know only with
    `"zero_allow_untested_optimizer": true` in ds_config.json.
    """

    optimizer_class: type[torch.optim.Optimizer]
    # Takes parameter groups with `params`, `weight_decay` and `lr_scale`, and the configuration.
    build: Callable[[list[dict], Config], torch.optim.Optimizer]
    state_keys: tuple[str, ...]

    @property
    def bytes_per_weight(self) -> int:
        """Of the optimizer's state."""
        return 4 * len(self.state_keys)


def choose_fused_adamw(wanted: str) -> tuple[bool, str]:
    """(whether AdamW is torch's fused kernel, a warning or "").

    Args:
        wanted: "fused", "plain", or "auto": the faster one, as `./launch.sh check` measured, and
            without a measurement the fused one on GPUs.

    Raises ConfigError when the fused kernel is asked for and was found wrong.
    """
    wrong = check_results.failure_reason("optimizers", "optimizer AdamW fused")
    speedup = check_results.measured_speed("optimizer AdamW fused")
    if wanted == "plain":
        return False, ""
    if wrong and wanted == "fused":
        raise ConfigError(f"optimizer=fused: {wrong}")
    if wrong:
        return False, f"optimizer: plain AdamW, whose update takes longer, as fused is {wrong}"
    if wanted == "fused":
        return True, ""
    return speedup > 1 if speedup else on_gpu(), ""


def build_adamw(groups: list[dict], config: Config) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in the implementation that `config.optimizer` asks for."""
    fused, _ = choose_fused_adamw(config.optimizer)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


OPTIMIZERS = {
    "adamw": OptimizerSpec(torch.optim.AdamW, build_adamw, state_keys=("exp_avg", "exp_avg_sq")),
}
ADAMW_IMPLEMENTATIONS = ("auto", "fused", "plain")  # further values of `config.optimizer`


def optimizer_spec(name: str) -> OptimizerSpec:
    """The optimizer that `config.optimizer` names. Raises ConfigError naming what is possible."""
    if name in ADAMW_IMPLEMENTATIONS:
        name = "adamw"
    if name not in OPTIMIZERS:
        possible = ", ".join((*ADAMW_IMPLEMENTATIONS, *OPTIMIZERS))
        raise ConfigError(f"optimizer={name}: must be one of {possible}")
    return OPTIMIZERS[name]


def spec_of(optimizer: torch.optim.Optimizer) -> OptimizerSpec:
    """The entry of OPTIMIZERS that an optimizer was built from. Raises KeyError without one."""
    for spec in OPTIMIZERS.values():
        if type(optimizer) is spec.optimizer_class:
            return spec
    raise KeyError(f"{type(optimizer).__name__} is not in OPTIMIZERS")


def optimizer_warning(config: Config) -> str:
    """What a person should know of the optimizer, or "". Raises ConfigError like the choice."""
    if optimizer_spec(config.optimizer) is not OPTIMIZERS["adamw"]:
        return ""
    _, warning = choose_fused_adamw(config.optimizer)
    return warning


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over the trainable parameters.

    Matrices decay, vectors (norms, biases) don't. LoRA's B matrices get `loraplus_lr_ratio` times
    the learning rate (LoRA+, arXiv 2402.12354). Each group holds its `lr_scale` for `set_lr`.
    """
    return optimizer_spec(config.optimizer).build(parameter_groups(model, config), config)


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """The trainable parameters by weight decay and learning rate, as torch's optimizers take them.

    No group is empty: an empty one crashes ZeRO-3 at the first boundary on torch >= 2.13.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trainable_parameters(model):
        shape = getattr(p, "ds_shape", p.shape)  # under zero.Init a parameter's own shape is empty
        weight_decay = config.weight_decay if len(shape) > 1 else 0.0
        is_lora_b = "lora_B" in name or "lora_embedding_B" in name
        lr_scale = config.loraplus_lr_ratio if is_lora_b else 1.0
        groups.setdefault((weight_decay, lr_scale), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay, "lr_scale": lr_scale}
        for (weight_decay, lr_scale), params in groups.items()
    ]


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """[(name, parameter)] of the parameters that require a gradient."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
