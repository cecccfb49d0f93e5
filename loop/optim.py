"""The optimiser's side of the step: AdamW, clipping over ZeRO-3's partitions, and the learning rate as a function of the step."""

import math
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from . import verdicts
from .config import Config, ConfigError
from .distributed import on_gpu


def choose_fused(wanted: str) -> tuple[bool, str]:
    """(whether AdamW is torch's fused kernel, what a person should know of it): `wanted`, or with "auto" the faster one, as
    `./launch.sh check` measured, otherwise fused on GPUs. Raises ConfigError when fused is asked for and was found wrong."""
    wrong, times = verdicts.why_not("optimizers", "optimizer AdamW fused"), verdicts.speed("optimizer AdamW fused")
    if wanted == "plain" or not wrong:
        return wanted == "fused" or (wanted == "auto" and (times > 1 if times else on_gpu())), ""
    if wanted == "fused":
        raise ConfigError(f"optimizer=fused: {wrong}")
    return False, f"optimizer: plain AdamW, whose update takes longer, as fused is {wrong}"


def adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters. Matrices decay, vectors (norms, biases) don't;
    LoRA's B matrices get `loraplus_lr_ratio` times the learning rate. Each group carries its `lr_scale` for `set_lr`."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            shape = getattr(p, "ds_shape", p.shape)  # under zero.Init a parameter's own shape is empty
            decay = config.weight_decay if len(shape) > 1 else 0.0
            scale = config.loraplus_lr_ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0
            groups.setdefault((decay, scale), []).append(p)
    # Only groups that hold something: an empty one crashes ZeRO-3 at the first boundary on torch >= 2.13.
    params = [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=choose_fused(config.optimizer)[0])


def cosine_lr(step: int, num_steps: int, lr: float, *, warmup_steps: int = 0, min_lr: float = 0.0,
              restart_steps: int | None = None, restart_mult: int = 1) -> float:  # fmt: skip
    """The learning rate of a step, counted from 0: linear warm-up from 0, then a cosine from `lr` down to `min_lr`.

    With `restart_steps`, warm restarts after SGDR (arXiv 1608.03983): the first cycle has that many steps, each further one
    `restart_mult` times more. A pure function: resuming needs no scheduler state, and the whole curve is known before the run."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    at, length = step - warmup_steps, num_steps - warmup_steps
    if restart_steps:
        length = restart_steps
        while at >= length:
            at, length = at - length, length * restart_mult
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(at / max(1, length), 1.0)))


def set_lr(optimizer, lr: float) -> None:
    """Gives every parameter group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def local_gradients(parameters: list) -> list[torch.Tensor]:
    """This rank's slices of the accumulated gradients, fp32: the buffers themselves that the optimiser will read, so that scaling in place is
    scaling the update (`build_ds_config` insists on fp32 accumulation: with bf16 they would be copies). All at once, for
    `safe_get_local_grad` takes as long for each of 308 parameters as for all."""
    groups = parameters[0]._z3_optimizer.get_fp32_grad_partitions()
    return [gradient for group in groups.values() for gradient in group.values()]


@torch.no_grad()
def clip_grad_norm(parameters, max_norm: float) -> torch.Tensor:
    """Clips the gradients to a global L2 norm of at most `max_norm` and returns the norm before clipping, a float64 on the device, for which
    nobody waits before the update is launched.

    parameters: the trainable ones of a ZeRO-3 engine, after the step's last backward and before `engine.step()`. Under ZeRO-3
    each rank holds a slice of every gradient, so the global norm is the root of the sum of all ranks' squares; the slices' padding
    is zero and doesn't count. The result is that of `torch.nn.utils.clip_grad_norm_`. Every rank must call it. A non-finite norm is
    returned and nothing is scaled."""
    slices = local_gradients(parameters)
    squares = torch.stack(torch._foreach_norm(slices)).double().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(slices, torch.where(norm.isfinite(), factor, 1.0).float())
    return norm


def spoil(parameters: list, bad: torch.Tensor) -> None:
    """Makes the accumulated gradient NaN where `bad` (one bool on the device) is true, upon which the update is skipped: one way of skipping,
    whatever the reason. One number of rank 0's is enough, as the norm is that of all ranks; it must not be in a slice's padding, which nothing
    ever overwrites."""
    if dist.get_rank() == 0:
        local_gradients(parameters)[0].view(-1)[:1].masked_fill_(bad, math.nan)


def spike_limit(recent: Sequence[float], sigmas: float | None) -> float:
    """The loss above which a step is a spike: `sigmas` standard deviations above the mean of the `recent` ones, of which it takes 20."""
    if sigmas is None or len(recent) < 20:
        return math.inf
    return statistics.fmean(recent) + sigmas * statistics.pstdev(recent)
