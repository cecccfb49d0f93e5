"""The optimiser's side of the step: AdamW, clipping over ZeRO-3's partitions, and the learning rate as a function of the step."""

import math

from ..config.schema import Config


def cosine_lr(
    step: int,
    num_steps: int,
    lr: float,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    restart_steps: int | None = None,
    restart_mult: int = 1,
) -> float:
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


def learning_rates(config: Config, num_steps: int) -> list[float]:
    return [
        cosine_lr(
            s,
            num_steps,
            config.lr,
            warmup_steps=config.warmup_steps,
            min_lr=config.min_lr,
            restart_steps=config.restart_steps,
            restart_mult=config.restart_mult,
        )
        for s in range(num_steps)
    ]
