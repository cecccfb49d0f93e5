"""Bin packing: items of given sizes into bins of a capacity, or into a number of equally full bins.

`best_fit_decreasing` packs examples into the steps of an epoch. `lpt_partition` spreads those of a
step over micro-batches. Both are deterministic: every rank finds the same packing.
"""

import bisect
import heapq

import numpy as np


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class _OpenBins:
    """Bins that still have free space, grouped by how much that is."""

    def __init__(self) -> None:
        self.free_spaces: list[int] = []  # those that occur, ascending
        self.bins: dict[int, list[np.ndarray]] = {}  # free space -> ids of the bins that have it

    def add(self, free: int, ids: np.ndarray) -> None:
        """Adds bins with `free` space each; full bins are forgotten."""
        if free == 0 or len(ids) == 0:
            return
        if free not in self.bins:
            bisect.insort(self.free_spaces, free)
            self.bins[free] = []
        self.bins[free].append(ids)

    def pop_best_fit(self, size: int) -> tuple[int, np.ndarray] | None:
        """Removes all bins with the least free space that holds `size`: (free space, their ids)."""
        at = bisect.bisect_left(self.free_spaces, size)
        if at == len(self.free_spaces):
            return None
        free = self.free_spaces.pop(at)
        return free, np.concatenate(self.bins.pop(free))


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Packs items into bins: largest item first, each into the bin with the least sufficient space.

    sizes: int [n], from 1 to `capacity`. Returns the bin of each item, int64 [n].

    The result is that of the textbook, but items of one size and bins with one amount of free space
    are handled together. So the Python loop runs some thousand times, whatever n is; item by item,
    10 million items take a minute.
    """
    by_size = np.argsort(-sizes, kind="stable")  # the largest first
    negated, starts = np.unique(-sizes[by_size], return_index=True)
    ends = [*starts[1:], len(sizes)]
    bin_of_item = np.empty(len(sizes), np.int64)
    open_bins = _OpenBins()
    num_bins = 0
    for size, start, end in zip(-negated, starts, ends):  # items start..end have this size
        while start < end:
            found = open_bins.pop_best_fit(size)
            if found:
                free, bins = found
            else:
                free = capacity
                num_new = ceil_div(end - start, capacity // size)
                bins = np.arange(num_bins, num_bins + num_new)
                num_bins += num_new
            # Best fit stays with a bin until its free space is below the size.
            per_bin = free // size
            num_used = min(len(bins), ceil_div(end - start, per_bin))
            num_items = min(end - start, num_used * per_bin)
            items = by_size[start : start + num_items]
            bin_of_item[items] = np.repeat(bins[:num_used], per_bin)[:num_items]
            start += num_items
            num_complete = num_items // per_bin  # bins that got `per_bin` items; the last may not
            in_last = num_items - num_complete * per_bin
            open_bins.add(free - per_bin * size, bins[:num_complete])
            open_bins.add(free - in_last * size, bins[num_complete:num_used])
            open_bins.add(free, bins[num_used:])
    return bin_of_item


def lpt_partition(items: list[int], sizes: dict[int, int], num_bins: int) -> list[list[int]]:
    """Partitions items into `num_bins` bins with about equal sums of sizes.

    Graham's LPT (longest processing time) rule: each item goes to the emptiest bin, which works
    best when the largest come first. Then `rebalance` swaps items. items: ids, the largest first.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    by_load = [(0, number) for number in range(num_bins)]  # a heap
    for item in items:
        load, number = heapq.heappop(by_load)
        bins[number].append(item)
        heapq.heappush(by_load, (load + sizes[item], number))
    rebalance(bins, sizes)
    return bins


def rebalance(bins: list[list[int]], sizes: dict[int, int]) -> None:
    """Swaps items of the fullest and the emptiest bin while that narrows the gap between them.

    Changes `bins` in place. A swap may also move one item without another in return.
    """
    if len(bins) < 2:
        return
    loads = [sum(sizes[item] for item in items) for items in bins]
    for _ in range(8 * len(bins)):  # a bound; two or three swaps a bin are enough
        fullest = loads.index(max(loads))
        emptiest = loads.index(min(loads))
        full = bins[fullest]
        empty = bins[emptiest]
        swap = _best_swap([sizes[item] for item in full], [sizes[item] for item in empty])
        if swap is None:
            break
        i, j, moved = swap
        bins[fullest] = full[:i] + full[i + 1 :] + empty[j : j + 1]
        bins[emptiest] = empty[:j] + empty[j + 1 :] + [full[i]]
        loads[fullest] -= moved
        loads[emptiest] += moved


def _best_swap(full: list[int], empty: list[int]) -> tuple[int, int, int] | None:
    """The swap of two items that brings the loads of two bins closest to each other.

    full, empty: the sizes of the bins' items. Returns (index in `full`, index in `empty`, by how
    much the load of `full` shrinks). The index len(empty) means that no item comes back. None where
    no swap narrows the gap. Ties go to the lower indices.
    """
    gap = sum(full) - sum(empty)
    given = np.array(full)
    returned = np.array([*empty, 0])  # the last: no item comes back
    by_size = np.argsort(returned, kind="stable")
    # Moving d leaves a gap of |gap - 2 d|. So the best item to get back for one of size s is one of
    # the two whose sizes are next to s - gap / 2.
    above = np.searchsorted(returned[by_size], given - gap / 2).clip(0, len(empty))
    best = (gap, 0, 0, 0)
    for i, at in enumerate(above):
        for neighbour in (max(0, at - 1), at):
            j = int(by_size[neighbour])
            moved = int(given[i] - returned[j])
            best = min(best, (abs(gap - 2 * moved), i, j, moved))
    new_gap, i, j, moved = best
    return (i, j, moved) if new_gap < gap else None
