"""The packed row that the attention checks share: its documents, its tensors, and a forward and backward pass over it."""

from collections.abc import Callable

import torch

LENGTHS = (
    1,
    37,
    300,
    129,
    45,
)  # unequal documents, the shortest possible among them; the last one is padding
Attend = Callable[..., torch.Tensor]  # query, key, value, cu_seqlens, max_seqlen -> output


def packed_row(
    lengths: tuple[int, ...], head_dim: int, device: str
) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Random query, key, value (4 query heads, 2 key heads) and the boundaries, padded by repeating the last."""
    torch.manual_seed(0)
    row = [
        torch.randn(sum(lengths), heads, head_dim, device=device, dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    ]
    bounds = torch.tensor((0, *lengths, 0, 0)).cumsum(0).to(device, torch.int32)
    return row, bounds, max(lengths)


def passes(
    attend: Attend, row: list[torch.Tensor], bounds: torch.Tensor, longest: int
) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value, under one fixed random gradient of the output."""
    row = [x.detach().requires_grad_() for x in row]
    out = attend(*row, bounds, longest)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, row, upstream)]
