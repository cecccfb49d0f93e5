"""The plan of all steps, and how a step is split over ranks and micro-batches."""

import time

import numpy as np
import pytest
from helpers import ROOT, seed_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.config.cli import load_config
from loop.data import bin_packing
from loop.data.batch_plan import PackingSpec, plan_batches, plan_run, split_step
from loop.data.bin_packing import best_fit_decreasing, lpt_partition, rebalance

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=200).map(np.array)


def one_by_one(sizes, capacity: int) -> list[int]:
    """Best-fit-decreasing as the textbook has it: the free space of each bin, sorted."""
    free_spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [free for free in free_spaces if free >= size]
        free = min(fitting) if fitting else capacity
        if fitting:
            free_spaces.remove(free)
        free_spaces.append(free - size)
    return sorted(free_spaces)


def test_each_item_goes_to_the_emptiest_bin(monkeypatch):
    """Before anything is swapped."""
    monkeypatch.setattr(bin_packing, "rebalance", lambda bins, sizes: None)
    sizes = dict(enumerate([9, 3, 3, 3, 2, 1]))
    assert lpt_partition(list(sizes), sizes, 2) == [[0, 4], [1, 2, 3, 5]]


def test_items_are_swapped_as_long_as_that_narrows_the_gap():
    sizes = dict.fromkeys(range(12), 1)
    bins = [list(range(12)), [], []]
    rebalance(bins, sizes)
    assert sorted(map(len, bins)) == [4, 4, 4]
    assert sorted(item for items in bins for item in items) == list(range(12))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(100, 400))
def test_the_histogram_packer_is_textbook_best_fit_decreasing(sizes, capacity):
    bins = best_fit_decreasing(sizes, capacity)
    loads = np.bincount(bins, weights=sizes).astype(int)
    assert sorted(capacity - loads) == one_by_one(sizes.tolist(), capacity)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(100, 1000), st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_holds_every_example_once_and_no_step_overflows(lengths, budget, seed, epochs):
    plan = plan_batches(lengths, budget, seed, epochs)
    assert sorted(plan.order.tolist()) == sorted(list(range(len(lengths))) * epochs)
    assert all(0 < lengths[plan[s]].sum() <= budget for s in range(len(plan)))
    assert sum(len(plan[s]) for s in range(len(plan))) == len(lengths) * epochs
    ends = np.cumsum([len(plan[s]) for s in range(len(plan))])
    # An epoch ends where a step ends.
    assert all(n * len(lengths) in ends for n in range(1, epochs + 1))
    again = plan_batches(lengths, budget, seed, epochs)
    assert np.array_equal(plan.order, again.order) and np.array_equal(plan.offsets, again.offsets)


def test_the_seed_profile_fills_the_budget():
    plan = plan_batches(seed_profile(9250), 16384, 42)
    assert plan.fill > 0.99
    assert abs(len(plan) - 826) < 8  # the report's 826 steps


def test_the_order_is_random():
    lengths = seed_profile(50_000)
    plan = plan_batches(lengths, 16384, 1)
    means = np.array([lengths[plan[s]].mean() for s in range(len(plan))])
    assert abs(np.corrcoef(np.arange(len(plan)), means)[0, 1]) < 4 / len(plan) ** 0.5
    # The examples of a step are nearly a random set: its mean length varies as that of as many
    # random examples does.
    counts = np.array([len(plan[s]) for s in range(len(plan))])
    assert means.std() < 1.2 * (lengths.std() / counts**0.5).mean()
    order = plan_batches(lengths, 16384, 1, epochs=2)
    company = [
        {frozenset((a, b)) for s in steps for a in order[s] for b in order[s] if a < b}
        for steps in (range(0, 200), range(len(plan), len(plan) + 4000))
    ]
    # An example shares its step with others in the second epoch.
    assert len(company[0] & company[1]) < 0.01 * len(company[0])
    assert not np.array_equal(order.order[: len(lengths)], plan_batches(lengths, 16384, 2).order)


def test_max_steps_ends_the_plan():
    plan = plan_batches(seed_profile(500), 16384, 1, max_steps=7)
    assert len(plan) == 7 and len(plan.order) == plan.offsets[-1]
    assert plan.tokens == seed_profile(500)[plan.order].sum()
    for max_steps in range(1, 10):  # two epochs of four steps each
        plan = plan_batches(np.full(4, 100), 100, 1, epochs=2, max_steps=max_steps)
        assert len(plan) == min(max_steps, 8)


def test_weights_are_visits_an_epoch():
    lengths, weights = seed_profile(2000), np.repeat([2.0, 1.0, 0.25], [200, 800, 1000])
    plan = plan_batches(lengths, 16384, 3, epochs=4, weights=weights)
    visits = np.bincount(plan.order, minlength=2000)
    assert (visits[:200] == 8).all() and (visits[200:1000] == 4).all()
    # A quarter of them in each of four epochs, drawn anew.
    assert 850 < visits[1000:].sum() < 1150 and visits[1000:].max() > 1
    ones = plan_batches(lengths, 16384, 3, weights=np.ones(2000))
    assert sorted(ones.order) == list(range(2000))
    with pytest.raises(ValueError, match="no epoch visits"):
        plan_batches(np.array([5]), 16384, 0, weights=np.array([1e-9]))


@pytest.mark.parametrize("lengths", [[], [3, 101], [0, 5]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="1..100"):
        plan_batches(np.array(lengths), 100, 0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30).map(np.array),
    st.integers(1, 8),
    st.integers(50, 400),
    st.sampled_from([0, 0.01, 1]),
)
def test_a_split_loses_nothing_and_ranks_agree_on_counts(
    lengths, world_size, max_tokens, pair_cost
):
    ranks = split_step(
        np.arange(len(lengths)), lengths, world_size, PackingSpec(max_tokens, 50, pair_cost)
    )
    assert len(ranks) == world_size and len({len(r) for r in ranks}) == 1
    assert sorted(i for r in ranks for m in r for i in m) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in m) <= max_tokens for r in ranks for m in r)


def test_a_split_is_balanced():
    lengths = seed_profile(9250)
    plan = plan_batches(lengths, 16384, 42)
    fractions = []  # of the step's tokens, on the fuller rank
    for s in range(100):
        loads = [
            int(lengths[r[0]].sum())
            for r in split_step(plan[s], lengths, 2, PackingSpec(16384, 2048))
        ]
        assert abs(loads[0] - loads[1]) <= lengths[plan[s]].max()
        fractions.append(max(loads) / sum(loads))
    assert np.mean(fractions) < 0.52


def test_an_example_above_max_tokens_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        split_step(np.array([0]), np.array([60]), 1, PackingSpec(50, 50))


@pytest.mark.slow
def test_ten_million_examples_are_planned_in_seconds():
    lengths = seed_profile(10_000_000)
    start = time.process_time()
    plan = plan_batches(lengths, 16384, 0)
    # 4 s were measured; the bound is generous on purpose.
    assert plan.fill > 0.99 and time.process_time() - start < 60


def test_a_step_that_holds_an_example_twice_keeps_both():
    """As data.weights above 1 make them; swaps go by the index in a bin, not by id."""
    lengths = np.clip(np.random.default_rng(0).normal(700, 250, 100), 64, 2048).astype(int)
    plan = plan_batches(lengths, 8 * 2048, 0, weights=np.full(100, 8.0))
    twice = 0
    for ids in (plan[s] for s in range(len(plan))):
        ranks = split_step(ids, lengths, 2, PackingSpec(5 * 2048, 2048))
        assert sorted(i for rank in ranks for part in rank for i in part) == sorted(ids)
        twice += len(set(ids)) < len(ids)
    assert twice > 5


def test_ranks_are_filled_evenly():
    lengths = seed_profile(3000)
    plan = plan_batches(lengths, 16 * 2048, 0)
    packing = PackingSpec(9 * 2048, 2048)
    loads = []
    for step in range(len(plan)):
        ranks = split_step(plan[step], lengths, 2, packing)
        loads.append([lengths[sum(rank, [])].sum() for rank in ranks])
    assert (np.max(loads, 1) / np.mean(loads, 1)).mean() < 1.001


def test_attention_counts_where_lengths_are_mixed():
    """Long visits among short ones: by work, the fullest rank has hardly more than the mean.

    By tokens it has far more. Where a micro-batch is too small for a split by work, tokens alone
    count, rather than a micro-batch more.
    """
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(6000, 8192, 60), rng.integers(100, 1500, 1500)])
    plan = plan_batches(lengths, 32 * 2048, 0)
    pair_cost = 1e-4

    def fullest(assumed_cost: float, max_tokens: int) -> np.ndarray:
        """[steps]: work of the fullest rank over the mean; and all have one micro-batch."""
        work = []
        for step in range(len(plan)):
            ranks = split_step(plan[step], lengths, 4, PackingSpec(max_tokens, 8192, assumed_cost))
            assert [len(rank) for rank in ranks] == [1] * 4
            work.append(
                [sum(lengths[i] + pair_cost * lengths[i] ** 2 for i in rank[0]) for rank in ranks]
            )
        return np.max(work, 1) / np.mean(work, 1)

    assert fullest(pair_cost, 12 * 2048).mean() < 1.005
    assert fullest(0, 12 * 2048).mean() > 1.08
    tight = max(
        sum(lengths[i] for i in part)
        for step in range(len(plan))
        for (part,) in split_step(plan[step], lengths, 4, PackingSpec(12 * 2048, 8192))
    )
    assert fullest(pair_cost, int(tight)).mean() < fullest(0, int(tight)).mean() + 1e-9


def test_a_runs_plan_is_that_of_its_configuration():
    base = ["--config", str(ROOT / "loop/configs/embedded.yaml")]
    config = load_config([*base, "seed=7", "epochs=3", "batch_size=2", "max_seq_len=512"])
    lengths = np.arange(1, 200)
    plan = plan_run(config, lengths, None)
    assert sorted(plan.order) == sorted([*range(199)] * 3)
    assert np.array_equal(plan.order, plan_batches(lengths, 2 * 512, 7, 3).order)
    shorter = plan_run(load_config([*base, "max_steps=2"]), lengths, None)
    assert len(shorter) == 2
