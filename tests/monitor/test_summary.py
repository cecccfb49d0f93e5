"""A run in words."""

import numpy as np
import pytest

from loop.config.schema import Config
from loop.data.batch_plan import plan_batches
from loop.monitor.summary import describe_duration, describe_plan, write_plan


def test_tokens_are_those_of_all_epochs():
    lengths, targets = np.array([10] * 6), np.array([1, 2, 3, 4, 5, 6])
    plan = plan_batches(lengths, budget=20, seed=0, epochs=2)
    config = Config(base="x", data={"train": "x"}, max_seq_len=20, batch_size=1)
    text = describe_plan(plan, lengths, targets, config, world_size=1, micro_batch_size=1)
    assert "6 steps, 12 examples, 2.0 a step; 120 tokens, 42 of them supervised" in text


def test_the_planned_learning_rate_is_that_of_each_step():
    class Board:
        points: list[tuple[int, float]] = []

        def add_scalar(self, tag, value, step):
            self.points.append((step, value))

    write_plan(Board(), "", np.array([1]), [0.1, 0.2, 0.3], first_step=1)
    assert Board.points == [(2, 0.2), (3, 0.3)]


@pytest.mark.parametrize(
    "seconds, words",
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (27_000, "7.5 h")],
)
def test_a_duration_is_in_the_unit_in_which_one_waits(seconds, words):
    assert describe_duration(seconds) == words
