"""The optimiser's side of the step: AdamW, clipping over ZeRO-3's partitions, and the learning rate as a function of the step."""

import torch
import torch.nn as nn

from ..config.schema import Config, ConfigError
from ..distributed.world import on_gpu
from ..kernels import check_results


def choose_fused_adamw(wanted: str) -> tuple[bool, str]:
    """(whether AdamW is torch's fused kernel, what a person should know of it): `wanted`, or with "auto" the faster one, as
    `./launch.sh check` measured, otherwise fused on GPUs. Raises ConfigError when fused is asked for and was found wrong."""
    wrong, times = (
        check_results.failure_reason("optimizers", "optimizer AdamW fused"),
        check_results.measured_speedup("optimizer AdamW fused"),
    )
    if wanted == "plain" or not wrong:
        return wanted == "fused" or (wanted == "auto" and (times > 1 if times else on_gpu())), ""
    if wanted == "fused":
        raise ConfigError(f"optimizer=fused: {wrong}")
    return False, f"optimizer: plain AdamW, whose update takes longer, as fused is {wrong}"


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters. Matrices decay, vectors (norms, biases) don't;
    LoRA's B matrices get `loraplus_lr_ratio` times the learning rate. Each group carries its `lr_scale` for `set_lr`."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            shape = getattr(
                p, "ds_shape", p.shape
            )  # under zero.Init a parameter's own shape is empty
            decay = config.weight_decay if len(shape) > 1 else 0.0
            scale = (
                config.loraplus_lr_ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0
            )
            groups.setdefault((decay, scale), []).append(p)
    # Only groups that hold something: an empty one crashes ZeRO-3 at the first boundary on torch >= 2.13.
    params = [
        {"params": ps, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), ps in groups.items()
    ]
    return torch.optim.AdamW(
        params,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=choose_fused_adamw(config.optimizer)[0],
    )


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
