"""The one idea of this loop: an optimizer step is a set of complete examples, planned in advance.

`plan_batches` is a pure function of (lengths, budget, seed, epochs): which examples a step holds.
`split_step` is a pure function of (a step, number of ranks, packing): which rank computes which
examples in which micro-batch. The split changes memory and speed and nothing else. So a run can
resume on another number of GPUs, every rank knows the step's number of targets without asking, and
all ranks agree on the number of micro-batches: none waits for another for ever.
"""

import dataclasses

import numpy as np

from ..config.schema import Config, ConfigError
from .bin_packing import best_fit_decreasing, ceil_div, lpt_partition

MOST_VISITS = 10**8  # of examples in an epoch: planning it takes a minute


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """All steps of a run. `plan[s]` are the example ids of step s, `len(plan)` is their number."""

    order: np.ndarray  # int32 [visits of examples]: step s has order[offsets[s] : offsets[s + 1]]
    offsets: np.ndarray  # int64 [steps + 1]
    tokens: int  # of all examples in `order`
    budget: int  # tokens a step may hold

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, step: int) -> np.ndarray:
        return self.order[self.offsets[step] : self.offsets[step + 1]]

    @property
    def fill(self) -> float:
        """The fraction of the token budget that carries tokens."""
        if len(self) == 0:
            return 0.0
        return self.tokens / (len(self) * self.budget)


@dataclasses.dataclass(frozen=True)
class PackingSpec:
    """How a rank packs its examples of a step into rows, each row one micro-batch."""

    max_tokens: int  # a micro-batch may hold
    max_seq_len: int  # tokens of the longest possible example
    pair_cost: float = 0.0  # of attention between two tokens, in tokens; balances ranks
    padded_shape: tuple[int, int] | None = None  # (tokens, documents) to fill up to; CUDA graphs


def plan_batches(
    lengths: np.ndarray,
    budget: int,
    seed: int,
    epochs: int = 1,
    max_steps: int | None = None,
    weights: np.ndarray | None = None,
) -> BatchPlan:
    """Plans all steps of a run.

    Every epoch visits every example once and is packed anew, so the examples that share a step
    differ between epochs and between seeds.

    Args:
        lengths: int [n], tokens of each example.
        budget: tokens a step may hold.
        seed: of the order of examples and steps.
        epochs: passes over the examples.
        max_steps: the plan ends after so many steps; None: with the last epoch.
        weights: float [n], how often an epoch visits each example, instead of once. The fractional
            part is a probability, drawn anew in every epoch.

    Raises ValueError for no lengths, for a length outside 1..budget, and for weights so small that
    no example is visited, or too large.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0 or lengths.max() > budget or lengths.min() < 1:
        raise ValueError(f"lengths must lie in 1..{budget} and not be empty")
    if weights is not None and weights.sum() > MOST_VISITS:
        raise ValueError(f"an epoch would visit more than {MOST_VISITS:,} examples; give less")
    orders = []
    counts = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        visits = np.arange(len(lengths))
        if weights is not None:
            repeats = np.floor(weights + rng.random(len(lengths))).astype(np.int64)
            visits = np.repeat(visits, repeats)
        if len(visits):
            order, examples_per_step = _pack_epoch(rng.permutation(visits), lengths, budget, rng)
            orders.append(order)
            counts.append(examples_per_step)
            if max_steps and sum(map(len, counts)) >= max_steps:
                break  # what comes later would be cut off
    if not orders:
        raise ValueError("the weights are so small that no epoch visits an example")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    if max_steps:
        offsets = offsets[: max_steps + 1]
    order = np.concatenate(orders)[: offsets[-1]]
    return BatchPlan(order, offsets, int(lengths[order].sum()), budget)


def plan_run(config: Config, lengths: np.ndarray, weights: np.ndarray | None) -> BatchPlan:
    """The plan of a run by its configuration. Arguments are those of `plan_batches`.

    Raises ConfigError.
    """
    try:
        return plan_batches(
            lengths, config.tokens_per_step, config.seed, config.epochs, config.max_steps, weights
        )
    except ValueError as error:
        raise ConfigError(f"data.weights={config.data.weights}: {error}") from error


def _pack_epoch(
    visits: np.ndarray, lengths: np.ndarray, budget: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Packs the examples of one epoch into steps. visits: int [n], example ids in random order.

    Returns (ids in the order of the steps, int32 [n]; number of examples of each step, int64
    [steps]).

    Best-fit-decreasing alone would put long examples with long ones and short with short. So nine
    tenths of the tokens are first tied into bundles of neighbours in the random order. A bundle has
    about 0.3 of the budget: three make a random nine tenths of a step, and single examples fill its
    gap. On the seed data's lengths the mean length of a step then varies by 107 tokens (294 without
    bundles, 101 for a random step), at the same fill.
    """
    sizes = lengths[visits]
    ends = np.cumsum(sizes)
    middles = ends - sizes / 2
    bundle = (middles // (0.3 * budget)).astype(np.int64)  # of each example
    is_single = np.arange(len(visits)) >= np.searchsorted(ends, 0.9 * ends[-1])
    # A bundle can exceed the budget when one of its examples is nearly as long as a step.
    is_single |= np.bincount(bundle, weights=sizes)[bundle] > budget
    bundle[is_single] = bundle[-1] + 1 + np.arange(is_single.sum())  # each a bundle of its own
    bundle = np.unique(bundle, return_inverse=True)[1]  # numbered without gaps
    bundle_sizes = np.bincount(bundle, weights=sizes).astype(np.int64)
    step_of_bundle = best_fit_decreasing(bundle_sizes, budget)
    # Steps are put into random order, or the run would go from long examples to short ones.
    shuffled_steps = rng.permutation(step_of_bundle.max() + 1)
    step = shuffled_steps[step_of_bundle][bundle]  # of each example
    order = visits[np.argsort(step, kind="stable")].astype(np.int32)
    return order, np.bincount(step)


def split_step(
    step: np.ndarray, lengths: np.ndarray, world_size: int, packing: PackingSpec
) -> list[list[list[int]]]:
    """Splits a step over ranks and micro-batches: `[rank][micro_batch] -> example ids`.

    There are as few micro-batches as hold at most `max_tokens` each, the same number on every rank,
    and they are balanced by their work. A micro-batch is empty when there are fewer examples than
    micro-batches. Raises ValueError when an example exceeds `max_tokens`.

    An example of L tokens is work for L + pair_cost * L^2 tokens (`model.flops`). Where balancing
    by that work would exceed `max_tokens`, the micro-batches are balanced by tokens alone. The
    longest example comes first, each goes to the emptiest micro-batch (Graham's LPT rule), then
    examples are swapped. Ties go to the lower id, so every rank finds the same split. With 16 rows
    on two ranks, the seed data's lengths and pair_cost=0, the fuller rank has 0.02 % more tokens
    than the mean (1.3 % without swaps).

    Args:
        step: int [examples], example ids, as `plan[s]`.
        lengths: int [n], tokens of every example of the run.
        world_size: number of ranks.
        packing: `max_tokens` and `pair_cost` are read.
    """
    max_tokens = packing.max_tokens
    tokens = {i: int(lengths[i]) for i in step.tolist()}
    work = {i: n + round(packing.pair_cost * n * n) for i, n in tokens.items()}
    longest_first = sorted(step.tolist(), key=lambda i: (-tokens[i], i))
    if longest_first and tokens[longest_first[0]] > max_tokens:
        raise ValueError(
            f"an example of {tokens[longest_first[0]]} tokens does not fit a micro-batch of "
            f"{max_tokens}"
        )
    total = sum(tokens[i] for i in longest_first)
    rounds = max(1, ceil_div(total, max_tokens * world_size))  # micro-batches of each rank
    while True:
        for sizes in (work, tokens):
            micro_batches = lpt_partition(longest_first, sizes, rounds * world_size)
            fullest = max(sum(tokens[i] for i in ids) for ids in micro_batches)
            if fullest <= max_tokens:
                return [micro_batches[rank::world_size] for rank in range(world_size)]
        rounds += 1
