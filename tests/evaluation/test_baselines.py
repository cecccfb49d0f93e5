"""What notes are compared with."""

from types import SimpleNamespace

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
