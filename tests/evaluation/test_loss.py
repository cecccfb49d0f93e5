"""The loss of a split is the same on any number of ranks, some of which may have nothing to do."""

import math
import types

import numpy as np
import pytest
import torch

from loop.data.batch_plan import PackingSpec
from loop.data.tokenization import Example
from loop.evaluation.loss import evaluate_loss, example_losses

VOCABULARY = 11


class ByToken(torch.nn.Module):
    """Logits that depend on the token alone, at the positions that are asked for."""

    def forward(self, input_ids, logits_to_keep, **_):
        tokens = input_ids[:, logits_to_keep].double()
        columns = torch.arange(VOCABULARY)
        return types.SimpleNamespace(logits=torch.sin(tokens[..., None] * columns))


def make_examples(count: int) -> list[Example]:
    draw = np.random.default_rng(0)
    examples = []
    for i in range(count):
        ids = draw.integers(0, VOCABULARY, 5 + i).astype(np.int32)
        labels = ids.copy()
        labels[: 2 + i % 3] = -100
        examples.append(Example(str(i), ids, labels))
    return examples


ENGINE = types.SimpleNamespace(module=ByToken())
PACKING = PackingSpec(40, 32)


def one_of_ranks(rank: int, world_size: int, others: np.ndarray | float = 0.0):
    """A rank beside others that add so much to each sum."""
    return types.SimpleNamespace(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        any=lambda flag: flag,
        sum_scalars=lambda *values: np.add(values, np.ravel(others)).tolist(),
    )


def losses_of_rank(examples, rank: int, world_size: int, requested=False) -> np.ndarray | None:
    """What one rank adds to the sum."""
    stop = types.SimpleNamespace(requested=requested)
    return example_losses(ENGINE, examples, PACKING, one_of_ranks(rank, world_size), stop)


def losses_alone(example: Example) -> tuple[float, int]:
    tokens = torch.tensor(example.input_ids).double()
    logits = torch.sin(tokens[:-1, None] * torch.arange(VOCABULARY)).float()
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(example.labels[1:]).long(), ignore_index=-100, reduction="sum"
    )
    return losses.item(), example.num_targets


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_losses_of_all_ranks_add_up_to_those_of_each_example(count, world_size):
    examples = make_examples(count)
    found = sum(losses_of_rank(examples, rank, world_size) for rank in range(world_size))
    wanted = np.array([losses_alone(example) for example in examples]).reshape(-1, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_every_rank_gets_the_sum_and_its_perplexity():
    examples = make_examples(9)
    own, others = (losses_of_rank(examples, rank, 2) for rank in (0, 1))
    ranks = one_of_ranks(0, 2, others)
    np.testing.assert_array_equal(
        example_losses(ENGINE, examples, PACKING, ranks), np.add(own, others)
    )
    loss, tokens = np.sum([losses_alone(example) for example in examples], 0)
    figures = evaluate_loss(ENGINE, examples, PACKING, ranks)
    assert figures["eval/loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert figures["eval/perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_a_stop_request_ends_it():
    assert losses_of_rank(make_examples(3), 0, 1, requested=True) is None
