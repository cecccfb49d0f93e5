"""What steers a note's next token, and what ends a note that runs in circles."""

import random

import pytest
import torch

from loop.config.schema import GenerationSettings
from loop.generation.controls import (
    FEWEST_PERIODS,
    LONGEST_PERIOD,
    SHORTEST_LOOP,
    LoopDetector,
    NoRepeatNgram,
    logits_processors,
    sampling_warpers,
)

PROMPT = [5, 6, 7, 5, 6, 7]


def write(processor, prefer: list[list[int]], count: int) -> list[list[int]]:
    """The greedy notes of a batch; each row takes the first token of its list that is allowed."""
    ids = torch.tensor([PROMPT] * len(prefer))
    for _ in range(count):
        scores = torch.zeros(len(prefer), 10)
        for row, tokens in enumerate(prefer):
            scores[row, tokens] = torch.arange(len(tokens), 0, -1.0)
        ids = torch.cat([ids, processor(ids, scores).argmax(1, keepdim=True)], 1)
    return ids[:, len(PROMPT) :].tolist()


def ngrams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_no_ngram_of_a_note_occurs_twice(n):
    """Random logits of 3 or 10 tokens; and nothing is banned that need not be."""
    torch.manual_seed(n)
    for size in (3, 10):
        count = size if n == 1 else min(20, size**n // 2)
        processor = NoRepeatNgram(n, [[], []])
        ids = torch.tensor([PROMPT] * 2)
        for _ in range(count):
            scores = torch.randn(2, size)
            steered = processor(ids, scores)
            for row in range(2):
                note = ids[row, len(PROMPT) :].tolist()
                for token in range(size):
                    repeats = len(note) >= n - 1 and (
                        ngrams([*note, token], n)[-1:] != []
                        and ngrams([*note, token], n)[-1] in ngrams(note, n)
                    )
                    assert (steered[row, token] == -torch.inf) == repeats
                    assert repeats or steered[row, token] == scores[row, token]
            if (steered == -torch.inf).all(1).any():
                break
            ids = torch.cat([ids, steered.argmax(1, keepdim=True)], 1)
        for note in ids[:, len(PROMPT) :].tolist():
            assert len(set(ngrams(note, n))) == len(ngrams(note, n))


def test_what_the_prompt_holds_may_be_copied_and_rows_do_not_mix():
    notes = write(NoRepeatNgram(2, [[], []]), [[5, 6], [6, 5]], 6)
    # 5 5 is new, then 5 must not follow 5 again; 6 is free until "6 6" was there.
    assert notes == [[5, 5, 6, 5, 0, 5], [6, 6, 5, 6, 0, 6]]
    copied = NoRepeatNgram(3, [[]])
    ids = torch.tensor([PROMPT])
    for token in PROMPT[:3]:  # the prompt has 5 6 7 twice, and the note may have it once
        assert copied(ids, torch.zeros(1, 10))[0, token] == 0
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    for token in PROMPT[3:5]:
        assert copied(ids, torch.zeros(1, 10))[0, token] == 0
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert copied(ids, torch.zeros(1, 10))[0].tolist() == [*[0.0] * 7, -torch.inf, 0.0, 0.0]


def test_a_beginning_in_the_prompt_belongs_to_the_note():
    """As a section's note so far does, where headings are forced."""
    (steered,) = NoRepeatNgram(2, [[5, 6, 7, 5]])(torch.tensor([PROMPT]), torch.zeros(1, 10))
    assert steered.isneginf().nonzero().flatten().tolist() == [6]


def loops_at(tokens: list[int]) -> int | None:
    """After how many tokens a note is found to run in circles."""
    detector = LoopDetector(1)
    ids = torch.tensor([tokens])
    for count in range(1, len(tokens) + 1):
        if detector.update(ids[:, :count]).item():
            return count
    return None


@pytest.mark.parametrize("period", [1, 2, 7, 12, 13, 40, LONGEST_PERIOD])
def test_a_loop_is_found_when_it_is_complete_and_not_before(period):
    """Whatever stands before it."""
    before = list(range(1000, 1100))
    loop = list(range(period))
    length = max(SHORTEST_LOOP, FEWEST_PERIODS * period)
    tokens = before + (loop * length)[:length]
    assert loops_at(tokens) == len(tokens)
    assert loops_at(tokens[100:]) == length
    assert loops_at(tokens[:-1]) is None


def test_what_is_no_loop_is_left_alone():
    rng = random.Random(0)
    assert loops_at([rng.randrange(50) for _ in range(2000)]) is None
    assert loops_at(list(range(LONGEST_PERIOD + 1)) * 8) is None  # a longer period
    # A list whose items begin alike.
    assert loops_at([t for i in range(30) for t in (1, 2, 3, 4, 5, 6, 7, 100 + i)]) is None
    # A word in between begins the count again.
    assert loops_at([*[7] * 47, 8, *[7] * 47]) is None


def test_each_note_of_a_batch_has_its_own_loop():
    detector = LoopDetector(3)
    ids = torch.stack([torch.arange(60), torch.arange(60) % 3, torch.full((60,), 4)])
    found = [detector.update(ids[:, :count]).tolist() for count in range(1, 61)]
    assert not any(any(f) for f in found[: SHORTEST_LOOP - 1])
    assert found[SHORTEST_LOOP - 1 :] == [[False, True, True]] * (61 - SHORTEST_LOOP)


def drawn(generation: GenerationSettings, ids: list[str]) -> list[int]:
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0, -4.0]).expand(len(ids), 5)
    prompt = torch.zeros(len(ids), 1, dtype=torch.int64)
    steered = logits_processors(generation, ids, "", [[] for _ in ids])(prompt, scores)
    return steered.argmax(1).tolist()


def test_the_settings_say_what_is_drawn():
    """min_p keeps tokens of at least its fraction of the likeliest one's probability."""
    ids = [str(i) for i in range(2000)]
    assert set(drawn(GenerationSettings(), ids)) == {0}
    assert set(drawn(GenerationSettings(temperature=1.5), ids)) == {0, 1, 2, 3, 4}
    # exp(-1) = 0.37, exp(-2) = 0.14
    assert set(drawn(GenerationSettings(temperature=1, min_p=0.2), ids)) == {0, 1}
    assert set(drawn(GenerationSettings(temperature=1, min_p=0.1), ids)) == {0, 1, 2}
    assert set(drawn(GenerationSettings(temperature=1, top_p=0.8), ids)) == {0, 1}
    plain, other = (drawn(GenerationSettings(temperature=1, seed=s), ids) for s in (0, 1))
    assert plain != other and plain[1000:] == drawn(GenerationSettings(temperature=1), ids[1000:])


def test_greedy_notes_are_steered_by_nothing():
    assert not logits_processors(GenerationSettings(), ["1"], "", [[]])


def test_three_times_the_same_is_no_loop_and_four_times_is():
    """A period of 40 tokens: 120 of them may be a list, 160 are a loop."""
    detector, period = LoopDetector(1), list(range(40))
    ids = torch.tensor([[99, *period * 4]])
    found = [bool(detector.update(ids[:, : n + 1])) for n in range(ids.shape[1])]
    assert found.index(True) == 4 * 40


def test_the_vocabulary_is_sorted_only_for_a_top_p():
    """Which takes most of a token's time on a CPU."""
    kinds = [[type(w).__name__ for w in sampling_warpers(0.7, p, 0.1)] for p in (1.0, 0.9)]
    assert kinds[0] == ["TemperatureLogitsWarper", "MinPLogitsWarper"]
    assert kinds[1] == ["TemperatureLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]
