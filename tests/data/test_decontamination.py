"""The same dialogue on both sides of a split."""

import json
import random

from helpers import ROOT

from loop.data.decontamination import find_near_duplicates, minhash

WORDS = [f"w{i}{'abcdefghij'[i % 10]}" for i in range(500)]


def text(seed: int, n: int = 200) -> list[str]:
    return random.Random(seed).choices(WORDS, k=n)


def test_case_spacing_and_punctuation_hide_nothing():
    words = text(0)
    (leak,) = find_near_duplicates(
        ["other " * 20, " ".join(words)], [" ".join(text(1)), ",  ".join(words).upper() + "."]
    )
    assert leak == (1, 1, "the same dialogue")


def test_a_few_changed_words_are_near_and_many_are_not():
    words = text(2)
    for changed, expected in ((2, True), (120, False)):
        other = list(words)
        for i in random.Random(0).sample(range(len(words)), changed):
            other[i] = "changed"
        found = find_near_duplicates([" ".join(words)], [" ".join(other)])
        assert bool(found) == expected
        assert not found or found[0][2].startswith("nearly the same dialogue (")


def test_short_texts_match_only_themselves():
    assert find_near_duplicates(["Doctor: hi", "x"], ["doctor hi", "y"]) == [
        (0, 0, "the same dialogue")
    ]
    assert find_near_duplicates(["a"], []) == [] and find_near_duplicates([], ["a"]) == []


def test_the_similarity_is_estimated():
    """Two texts with a third of their runs in common have about a third of the smallest hashes."""
    a, b, c = (" ".join(text(seed, 1000)) for seed in (3, 4, 5))
    one, two = minhash(a + b), minhash(b + c)
    smallest = sorted(set(one) | set(two))[:128]
    common = sum(h in set(one) and h in set(two) for h in smallest) / len(smallest)
    assert 0.15 < common < 0.55


def test_a_dialogue_that_goes_on_longer_is_nearly_the_same():
    """Of the longer one's runs 85 % are common, and so are about as many of its smallest hashes."""
    words = text(8, 2000)
    longer = " ".join([*words, *text(9, 350)])
    assert find_near_duplicates([longer], [" ".join(words)])


def test_the_embedded_splits_do_not_leak():
    dialogues = {
        s: [
            json.loads(line)["dialogue"]
            for line in (ROOT / "loop/embedded/data" / f"{s}.jsonl").open()
        ]
        for s in ("train", "valid", "test")
    }
    assert find_near_duplicates(dialogues["train"], dialogues["valid"] + dialogues["test"]) == []


def test_nearly_the_same_begins_at_four_fifths():
    """Two texts of which two thirds of all runs are common are two texts, six sevenths are not."""
    words = text(6, 2000)
    for kept, expected in ((1600, False), (1850, True)):  # of 2,000: 0.67 and 0.86 of all runs
        other = " ".join([*words[:kept], *text(7, 2000 - kept)])
        assert bool(find_near_duplicates([" ".join(words)], [other])) == expected, kept
