"""The optimiser's side of the step: AdamW, clipping over ZeRO-3's partitions, and the learning rate as a function of the step."""

import math

import torch
import torch.distributed as dist


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


def invalidate_gradients(parameters: list, bad: torch.Tensor) -> None:
    """Makes the accumulated gradient NaN where `bad` (one bool on the device) is true, upon which the update is skipped: one way of skipping,
    whatever the reason. One number of rank 0's is enough, as the norm is that of all ranks; it must not be in a slice's padding, which nothing
    ever overwrites."""
    if dist.get_rank() == 0:
        local_gradients(parameters)[0].view(-1)[:1].masked_fill_(bad, math.nan)
