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
from loop.evaluation.rouge import ROUGE, lcs_indices, lcs_length, rouge_scores

TEXTS = st.lists(st.sampled_from(["a ", "b ", "c ", "d-e ", "\n", " \n", "9."]), max_size=60).map(
    "".join
)


def theirs(reference: str, note: str) -> dict[str, float]:
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    return {name: score.fmeasure for name, score in scorer.score(reference, note).items()}


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_any_two_texts_score_as_with_the_library(reference, note):
    assert rouge_scores(reference, note) == theirs(reference, note)


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
