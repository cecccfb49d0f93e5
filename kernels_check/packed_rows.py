"""The packed row that the attention checks share, and a forward and backward pass over it."""

from collections.abc import Callable

import torch

LENGTHS = (1, 37, 300, 129, 45)  # unequal documents, the shortest possible among them
Attend = Callable[..., torch.Tensor]  # query, key, value, cu_seqlens, max_seqlen -> output


def packed_row(
    lengths: tuple[int, ...], head_dim: int, device: str
) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """([query, key, value], boundaries, length of the longest document), random, in bf16.

    query [T, 4, head_dim], key and value [T, 2, head_dim]; the boundaries int32
    [len(lengths) + 3], padded by repeating the last one.
    """
    torch.manual_seed(0)
    tokens = sum(lengths)
    row = [
        torch.randn(tokens, heads, head_dim, device=device, dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    ]
    bounds = torch.tensor((0, *lengths, 0, 0)).cumsum(0).to(device, torch.int32)
    return row, bounds, max(lengths)


def run_both_passes(
    attend: Attend, row: list[torch.Tensor], bounds: torch.Tensor, longest: int
) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value.

    The gradient of the output is random, and the same in every call.
    """
    row = [x.detach().requires_grad_() for x in row]
    out = attend(*row, bounds, longest)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, row, upstream)]
