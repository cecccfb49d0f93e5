"""The accumulated gradients in ZeRO-3's slices, between the last backward pass and the update."""

import math

import torch
import torch.distributed as dist


def local_gradients(parameters: list) -> list[torch.Tensor]:
    """This rank's slices of the accumulated gradients, fp32.

    These are the buffers that the optimizer will read, so scaling them in place scales the update.
    `build_ds_config` insists on fp32 accumulation for that: with bf16 they would be copies. They
    come all at once, as `safe_get_local_grad` takes as long for each of 308 parameters as for all.
    """
    groups = parameters[0]._z3_optimizer.get_fp32_grad_partitions()
    return [gradient for group in groups.values() for gradient in group.values()]


@torch.no_grad()
def clip_grad_norm(parameters, max_norm: float) -> torch.Tensor:
    """Clips the gradients to a global L2 norm of at most `max_norm`. Every rank must call it.

    Returns the norm before clipping, a float64 on the device. Nobody waits for it before the update
    is launched. A norm that is not finite is returned, and nothing is scaled.

    Under ZeRO-3 each rank holds a slice of every gradient, so the global norm is the root of the
    sum of all ranks' squares. The slices' padding is zero and does not count. The result is that of
    `torch.nn.utils.clip_grad_norm_`.

    parameters: the trainable ones of a ZeRO-3 engine, after the step's last backward pass and
    before `engine.step()`.
    """
    slices = local_gradients(parameters)
    squares = torch.stack(torch._foreach_norm(slices)).double().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(slices, torch.where(norm.isfinite(), factor, 1.0).float())
    return norm


def invalidate_gradients(parameters: list, bad: torch.Tensor) -> None:
    """Makes the accumulated gradient NaN where `bad` is true, so that the update is skipped.

    Thus there is one way of skipping, whatever the reason. One number of rank 0's is enough, as the
    norm is that of all ranks. It must not be in a slice's padding, which nothing ever overwrites.

    bad: one bool, on the device.
    """
    if dist.get_rank() == 0:
        local_gradients(parameters)[0].view(-1)[:1].masked_fill_(bad, math.nan)
