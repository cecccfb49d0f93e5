"""ROUGE's figures are those of `rouge-score`, to the bit, at a fraction of its time."""

import random
import time

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from loop.config.cli import load_config
from loop.data.conversations import dialogue_text, note_text, read_split
from loop.evaluation.rouge import (
    ROUGE,
    edit_distance,
    edit_similarity,
    lcs_indices,
    lcs_length,
    rouge_scores,
)

TEXTS = st.lists(st.sampled_from(["a ", "b ", "c ", "d-e ", "\n", " \n", "9."]), max_size=60).map(
    "".join
)


def theirs(reference: str, note: str) -> dict[str, float]:
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    return {name: score.fmeasure for name, score in scorer.score(reference, note).items()}


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_any_two_texts_score_as_with_the_library(reference, note):
    scores, library = rouge_scores(reference, note), theirs(reference, note)
    if scores["rouge1"] == 1 and reference.split() == note.split():
        library["rouge2"] = 1.0  # theirs is 0 for one word
    assert scores == library


@pytest.mark.parametrize("text", ["None.", "None", "-", "N/A", "No pain."])
def test_a_short_text_is_like_itself(text):
    assert set(rouge_scores(text, text).values()) == {1.0}
    assert rouge_scores(text, "Fever.")["rouge2"] == rouge_scores("", "")["rouge2"] == 0


def slow_edit_distance(text: str, other: str) -> int:
    """The table of Wagner and Fischer, cell by cell."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(text, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(st.text("abc ", max_size=70), st.text("abcd", max_size=70))
def test_edits_are_those_of_the_plain_table(text, other):
    assert edit_distance(text, other) == slow_edit_distance(text, other)


def test_edit_similarity_is_1_for_the_same_and_0_for_another_text():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_similarity("S: a\n b", "S: a b ") == edit_similarity("", "") == 1
    assert edit_similarity("aaa", "bbb") == edit_similarity("", "b") == 0
    assert edit_similarity("abcd", "abxd") == 0.75


def test_the_embedded_notes_score_as_with_the_library():
    config = load_config(["--config", str(ROOT / "loop/configs/embedded.yaml")])
    conversations = read_split(config, "test")[0][:12]
    for one, other in zip(conversations, conversations[1:]):
        for text in (note_text(other), dialogue_text(one)):
            assert rouge_scores(note_text(one), text) == theirs(note_text(one), text)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_rows_that_are_computed_twice_are_the_same(count):
    """A shuffled list, whose way back crosses every block of rows."""
    words = [f"w{i % 40}" for i in range(count)]
    others = random.Random(count).sample(words, count)
    indices = sorted(lcs_indices(words, tuple(others)))
    assert len(indices) == lcs_length(words, others) == lcs_length(others, words)
    rest = iter(others)
    assert all(words[i] in rest for i in indices)  # a common subsequence


def test_a_note_of_20000_words_takes_seconds():
    """A table of integers would have 4e8 entries."""
    words = [f"w{i % 700}" for i in range(20_000)]
    start = time.process_time()
    scores = rouge_scores(" ".join(words), "\n".join(words))
    assert scores["rougeL"] == 1 and time.process_time() - start < 60
