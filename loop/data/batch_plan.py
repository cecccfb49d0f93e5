"""The one idea of this loop: an optimizer step is a set of whole examples, planned in advance.

`make_plan` is a pure function of (lengths, budget, seed, epochs): for each step of the run the example ids that fill the step's
token budget. `cut` is a pure function of (a step, ranks, micro-batch capacity): which rank computes which examples when.
How a step is cut changes memory and speed and nothing else, so a run may be continued on another number of GPUs, every
rank knows the step's number of targets without asking, and ranks always agree on the number of micro-batches, so nothing hangs.
"""

import dataclasses

import numpy as np

from .bin_packing import best_fit_decreasing, lpt_partition


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """All steps of a run. `order[offsets[s]:offsets[s + 1]]` are the example ids of step s."""

    order: np.ndarray  # int32 [epochs * examples]
    offsets: np.ndarray  # int64 [steps + 1]
    tokens: int  # of all examples of the plan
    budget: int  # tokens a step may hold

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, step: int) -> np.ndarray:
        return self.order[self.offsets[step] : self.offsets[step + 1]]

    @property
    def fill(self) -> float:
        """Share of the token budget that carries tokens."""
        return self.tokens / (len(self) * self.budget) if len(self) else 0.0


def _pack_epoch(
    shuffled: np.ndarray, lengths: np.ndarray, budget: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch of the examples `shuffled`, int [n]: (order int32 [n], examples in each step int64 [steps]).

    Best-fit-decreasing alone would put long examples with long ones and short with short. So nine tenths of the tokens are first tied
    into bundles of neighbours in the random order, each of about 0.3 of the budget: three of them make a random nine tenths of a step, and the
    single examples fill its gap. On the seed's lengths the mean length of a step then varies by 107 tokens (294 without bundles, 101 for
    a random step), at the same fill."""
    sizes = lengths[shuffled]
    ends = np.cumsum(sizes)
    bundle = ((ends - sizes / 2) // (0.3 * budget)).astype(
        np.int64
    )  # of each example, by where its middle lies
    single = np.arange(len(shuffled)) >= np.searchsorted(ends, 0.9 * ends[-1])
    single |= (
        np.bincount(bundle, weights=sizes)[bundle] > budget
    )  # possible when an example is nearly as long as a step
    bundle[single] = bundle[-1] + 1 + np.arange(single.sum())  # each a bundle of its own
    bundle = np.unique(bundle, return_inverse=True)[1]  # numbered without gaps
    step_of = best_fit_decreasing(np.bincount(bundle, weights=sizes).astype(np.int64), budget)
    step = rng.permutation(step_of.max() + 1)[step_of][
        bundle
    ]  # steps in random order, else the run would go from long to short
    return shuffled[np.argsort(step, kind="stable")].astype(np.int32), np.bincount(step)


def plan_batches(
    lengths: np.ndarray,
    budget: int,
    seed: int,
    epochs: int = 1,
    max_steps: int | None = None,
    weights=None,
) -> BatchPlan:
    """Plans the whole run. lengths: int [n], tokens of each example, none above `budget` (ValueError names the first).
    Every epoch holds every example once and packs anew; an example has other company in every epoch and seed. weights: float [n], how
    often an epoch visits an example instead; the fraction is a chance, drawn anew in every epoch."""
    lengths = np.asarray(lengths)
    if len(lengths) == 0 or lengths.max() > budget or lengths.min() < 1:
        raise ValueError(f"lengths must lie in 1..{budget} and not be empty")
    orders, counts = [], []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        visits = np.arange(len(lengths))
        if weights is not None:
            visits = np.repeat(
                visits, np.floor(weights + rng.random(len(lengths))).astype(np.int64)
            )
        if len(visits):
            order, count = _pack_epoch(rng.permutation(visits), lengths, budget, rng)
            orders.append(order)
            counts.append(count)
    if not orders:
        raise ValueError("the weights are so small that no epoch visits an example")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])[: (max_steps or 2**62) + 1]
    order = np.concatenate(orders)[: offsets[-1]]
    return BatchPlan(order, offsets, int(lengths[order].sum()), budget)


def split_step(
    step: np.ndarray, lengths: np.ndarray, world_size: int, capacity: int, pairs: float = 0.0
) -> list[list[list[int]]]:
    """Cuts a step into `[rank][micro_batch] -> example ids`: as few micro-batches as fit `capacity` tokens each, the same
    number on every rank, balanced by their work. A micro-batch may be empty when there are fewer examples than places.

    An example of L tokens is work for L + pairs L^2 tokens; pairs: what attention between two tokens costs, in tokens (`mfu.pair_cost`). Where
    a micro-batch would become too full so, and for pairs=0, tokens alone count. Longest first, each to the emptiest micro-batch (Graham's LPT
    rule), then swaps; ties go to the lower id, so every rank finds the same cut. With 16 rows on two ranks, the seed's lengths and pairs=0
    the fuller rank has 0.02 % more tokens than the mean (1.3 % without swaps)."""
    tokens = {i: int(lengths[i]) for i in step.tolist()}
    work = {i: n + round(pairs * n * n) for i, n in tokens.items()}
    examples = sorted(step.tolist(), key=lambda i: (-tokens[i], i))
    if examples and tokens[examples[0]] > capacity:
        raise ValueError(
            f"an example of {tokens[examples[0]]} tokens does not fit a micro-batch of {capacity}"
        )
    rounds = max(1, -(-sum(tokens[i] for i in examples) // (capacity * world_size)))
    while True:
        for sizes in (work, tokens):
            places = lpt_partition(examples, sizes, rounds * world_size)
            if max(sum(tokens[i] for i in place) for place in places) <= capacity:
                return [places[rank::world_size] for rank in range(world_size)]
        rounds += 1
