"""The one idea of this loop: an optimizer step is a set of whole examples, planned in advance.

`make_plan` is a pure function of (lengths, budget, seed, epochs): for each step of the run the example ids that fill the step's
token budget. `cut` is a pure function of (a step, ranks, micro-batch capacity): which rank computes which examples when.
How a step is cut changes memory and speed and nothing else, so a run may be continued on another number of GPUs, every
rank knows the step's number of targets without asking, and ranks always agree on the number of micro-batches, so nothing hangs.
"""

import bisect
import heapq

import numpy as np


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Puts items into bins, largest first, each where it leaves the least room. sizes: int [n], none above capacity.
    Returns the bin of each item, int64 [n].

    Exact best-fit-decreasing over histograms: items of one size and bins with one amount of room are moved together, so the
    Python loop takes some thousand turns whatever n is (the item-by-item version needs a minute for 10 million)."""
    by_size = np.argsort(-sizes, kind="stable")
    values, starts = np.unique(-sizes[by_size], return_index=True)
    bins = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # the amounts of room that occur, ascending
    holders: dict[int, list[np.ndarray]] = {}  # room -> ids of the bins that have it
    opened = 0

    def put(room: int, ids: np.ndarray) -> None:
        if room and len(ids):
            if room not in holders:
                bisect.insort(rooms, room)
                holders[room] = []
            holders[room].append(ids)

    for size, start, end in zip(-values, starts, [*starts[1:], len(sizes)]):
        while start < end:
            at = bisect.bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                ids = np.concatenate(holders.pop(room))
            else:
                room = capacity
                ids = np.arange(
                    opened, opened + -(-(end - start) // (capacity // size))
                )  # as many as are needed
                opened += len(ids)
            each = room // size  # best fit stays with a bin until its room is below the size
            used = min(len(ids), -(-(end - start) // each))
            take = min(end - start, used * each)
            bins[by_size[start : start + take]] = np.repeat(ids[:used], each)[:take]
            start += take
            full = take // each
            put(room - each * size, ids[:full])
            put(
                room - (take - full * each) * size, ids[full:used]
            )  # the last bin may have got fewer
            put(room, ids[used:])
    return bins


def lpt_partition(examples: list[int], sizes: dict[int, int], number: int) -> list[list[int]]:
    """So many places with about equal sums of sizes. examples: the largest first."""
    places: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, place) for place in range(number)]
    for example in examples:
        load, place = heapq.heappop(heap)
        places[place].append(example)
        heapq.heappush(heap, (load + sizes[example], place))
    rebalance(places, sizes)
    return places


def rebalance(places: list[list[int]], sizes: dict[int, int]) -> None:
    """Swaps examples of the fullest and the emptiest place, or moves one, as long as that brings the two nearer to each other."""
    loads = [sum(sizes[i] for i in place) for place in places]
    for _ in range(
        8 * len(places) if len(places) > 1 else 0
    ):  # two or three turns a place are enough
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        gap, out, back = loads[full] - loads[empty], places[full], places[empty]
        given = np.array([sizes[i] for i in out])
        others = np.array([*(sizes[i] for i in back), 0])  # the last: nothing comes back
        order = np.argsort(others, kind="stable")
        # Moving d leaves a gap of |gap - 2 d|. So for an example the best partner is one of the two next to its size - gap / 2.
        above = np.searchsorted(others[order], given - gap / 2).clip(0, len(back))
        pairs = [(a, order[at]) for a, end in enumerate(above) for at in {end, max(0, end - 1)}]
        new_gap, a, b, moved = (
            min((abs(gap - 2 * (d := int(given[a] - others[b]))), a, int(b), d) for a, b in pairs)
            if pairs
            else (gap, 0, 0, 0)
        )
        if new_gap >= gap:
            break
        places[full], places[empty] = (
            out[:a] + out[a + 1 :] + back[b : b + 1],
            back[:b] + back[b + 1 :] + [out[a]],
        )
        loads[full], loads[empty] = loads[full] - moved, loads[empty] + moved
