"""Ranks: what they tell each other, and how they begin."""

import random

import numpy as np
import pytest
import torch
from helpers import run_ok

from loop.distributed.seeding import seed_everything


def test_every_rank_gets_what_every_rank_says():
    """Values of unequal length, of JSON's types, NaN and other alphabets included; and nothing is pickled on the way."""
    code = (
        "import torch.distributed as dist; from loop.distributed import init_distributed; ranks = init_distributed()\n"
        "said = ranks.all_gather_json([None, 'a', {'Ä€': [1.5, float('nan')] * 40}][ranks.rank])\n"
        "assert said[:2] == [None, 'a'] and str(said[2]) == str({'Ä€': [1.5, float('nan')] * 40}), said\n"
        "assert ranks.any(ranks.rank == 2) and not ranks.any(False) and ranks.sum_scalars(ranks.rank, 1) == [3.0, 3.0]\n"
        "dist.barrier(); dist.destroy_process_group(); print('agreed')"
    )
    assert "agreed" in run_ok(3, "-c", code)


@pytest.mark.parametrize("seed", [0, 2**40])
def test_seeding_repeats_every_generator(seed):
    draws = []
    for _ in range(2):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
