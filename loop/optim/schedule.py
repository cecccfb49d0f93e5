"""The learning rate as a pure function of the step.

Resuming needs no scheduler state, and the whole curve is known before the run. To add a schedule,
write a function and add one line to SCHEDULES; the configuration's `lr_schedule` names it.
"""

import math
from collections.abc import Callable

from ..config.schema import Config, ConfigError


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
    """The learning rate of a step: linear warm-up from 0, then a cosine from `lr` to `min_lr`.

    Args:
        step: counted from 0.
        num_steps: of the run.
        restart_steps: length of the first cycle of warm restarts (SGDR, arXiv 1608.03983); None:
            one cycle over the whole run.
        restart_mult: each further cycle is this many times longer.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    position = step - warmup_steps  # within the cycle
    length = num_steps - warmup_steps
    if restart_steps:
        length = restart_steps
        while position >= length:
            position -= length
            length *= restart_mult
    progress = min(position / max(1, length), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(config: Config, num_steps: int) -> Callable[[int], float]:
    """`cosine_lr` with the configuration's warm-up and restarts."""

    def lr_at(step: int) -> float:
        return cosine_lr(
            step,
            num_steps,
            config.lr,
            warmup_steps=config.warmup_steps,
            min_lr=config.min_lr,
            restart_steps=config.restart_steps,
            restart_mult=config.restart_mult,
        )

    return lr_at


SCHEDULES: dict[str, Callable[[Config, int], Callable[[int], float]]] = {
    "cosine": cosine_schedule,
}


def build_lr_schedule(config: Config, num_steps: int) -> Callable[[int], float]:
    """The function from a step, counted from 0, to its learning rate.

    Raises ConfigError where `config.lr_schedule` is not in SCHEDULES, and where the warm-up is as
    long as the whole run.
    """
    if config.lr_schedule not in SCHEDULES:
        possible = ", ".join(SCHEDULES)
        raise ConfigError(f"lr_schedule={config.lr_schedule}: must be one of {possible}")
    if config.warmup_steps >= num_steps:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps}: the whole run has {num_steps} steps; "
            "lr would never be reached"
        )
    return SCHEDULES[config.lr_schedule](config, num_steps)


def set_lr(optimizer, lr: float) -> None:
    """Gives every parameter group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rates(config: Config, num_steps: int) -> list[float]:
    """The learning rates of all steps of a run."""
    lr_at = build_lr_schedule(config, num_steps)
    return [lr_at(step) for step in range(num_steps)]
