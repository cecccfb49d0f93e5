"""What notes are compared with."""

import collections
import math
import random
from types import SimpleNamespace

import pytest

from loop.data.conversations import Conversation
from loop.evaluation.baselines import most_similar, score_with_baselines
from loop.generation.decode import Note


def test_without_a_training_note_there_is_no_nearest_note():
    """As where --reference names a column that the test data alone have."""
    alone = SimpleNamespace(rank=0, world_size=1, all_gather_json=lambda value: [value])
    conversations = [
        Conversation("1", [], "Doctor: take 5 mg", "P: 5 mg"),
        Conversation("2", [], "Doctor: rest", "P: rest"),
    ]
    notes = {"1": Note("P: 5 mg", True), "2": Note("P: 6 mg", True)}
    rows, report = score_with_baselines(conversations, notes, [], alone)
    assert len(rows) == 2 and report["rouge1"]["value"] > 0
    assert not any("nearest" in key for key in report)


def test_the_most_similar_text_shares_rare_words():
    corpus = ["doctor the knee hurts", "doctor the ear hurts", "doctor the skin itches"]
    queries = ["the ear the ear", "an itching skin itches", "doctor"]
    assert most_similar(queries, corpus) == [1, 2, 0]


def plain_cosine(query: str, text: str, corpus: list[str]) -> float:
    """Of vectors (1 + log tf) log(n / df), as the docstring has it and any textbook."""

    def weights(words: str) -> dict[str, float]:
        counts = collections.Counter(words.split())
        df = {word: sum(word in other.split() for other in corpus) for word in counts}
        return {
            word: (1 + math.log(n)) * math.log(len(corpus) / df[word])
            for word, n in counts.items()
            if df[word]
        }

    ours, theirs = weights(query), weights(text)
    dot = sum(weight * theirs.get(word, 0.0) for word, weight in ours.items())
    return dot / (math.sqrt(sum(w * w for w in theirs.values())) or 1.0)


def test_the_most_similar_text_has_the_highest_tf_idf_cosine():
    """Long texts and common words win nothing: neither a dot product nor plain counts do it."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    common = [40 / (i + 1) for i in range(40)]

    def draw() -> str:
        return " ".join(rng.choices(words, common, k=rng.randint(3, 60)))

    corpus, queries = [draw() for _ in range(30)], [draw() for _ in range(60)]
    for query, found in zip(queries, most_similar(queries, corpus)):
        cosines = [plain_cosine(query, text, corpus) for text in corpus]
        assert cosines[found] == pytest.approx(max(cosines), rel=1e-12)
