"""Scores notes beside baselines that they have to beat on the same examples.

The baselines are the dialogue taken as the note, and the note of the most similar training
dialogue. The reference taken as the note is the best that can be reached.
"""

import collections
import math
import re

import numpy as np

from ..config.schema import TaskConfig
from ..data.conversations import Conversation, dialogue_text, note_text
from ..data.soap import SOAP
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..generation.decode import Note
from .scoring import Row, score_note, summarise


def score_with_baselines(
    conversations: list[Conversation],
    notes: dict[str, Note],
    train: list[Conversation],
    ranks: Ranks,
    task: TaskConfig = SOAP,
) -> tuple[list[Row], dict]:
    """(the rows in the order of their ids, the report of `summarise`), equal on every rank.

    Each rank scores its shard of the rows. Every rank must call it; their number changes nothing.

    Args:
        conversations: with dialogue and reference.
        notes: the note of each conversation, by id.
        train: searched for the most similar dialogue; if empty, that baseline is left out.
        task: names the headings of notes and references.
    """
    set_activity("scoring notes")
    rows = rows_of(conversations, notes)
    mine = rows[ranks.rank :: ranks.world_size]
    systems = {"notes": mine}
    if train:
        nearest = most_similar([row.dialogue for row in mine], [dialogue_text(c) for c in train])
        systems["nearest note"] = [
            row._replace(note=note_text(train[i]), ended=None) for row, i in zip(mine, nearest)
        ]
    systems["dialogue"] = [row._replace(note=row.dialogue, ended=None) for row in mine]
    systems["reference"] = [row._replace(note=row.reference, ended=None) for row in mine]
    shards = ranks.all_gather_json(
        {name: [score_note(row, task) for row in system] for name, system in systems.items()}
    )
    scores = {
        name: [shards[i % ranks.world_size][name][i // ranks.world_size] for i in range(len(rows))]
        for name in systems
    }
    return rows, summarise(scores, task)


def rows_of(conversations: list[Conversation], notes: dict[str, Note]) -> list[Row]:
    """What is scored, in the order of the ids. notes: the note of each conversation, by id."""
    return [
        Row(c.id, dialogue_text(c), note_text(c), *notes[c.id])
        for c in sorted(conversations, key=lambda c: c.id)
    ]


def most_similar(queries: list[str], corpus: list[str]) -> list[int]:
    """For each query, the index of the text of the corpus with the highest TF-IDF cosine.

    The weight of a word is (1 + log tf) log(n / df), for n texts in the corpus. Of equal texts it
    is the first.
    """
    counts = [_count_words(text) for text in corpus]
    document_frequency = collections.Counter(word for count in counts for word in count)
    idf = {word: math.log(len(corpus) / n) for word, n in document_frequency.items()}
    # word -> (the texts that hold it, its weight in each)
    postings: dict[str, tuple[list[int], list[float]]] = collections.defaultdict(lambda: ([], []))
    norms = np.ones(len(corpus))
    for i, count in enumerate(counts):
        weights = {word: (1 + math.log(n)) * idf[word] for word, n in count.items()}
        norms[i] = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        for word, weight in weights.items():
            ids, id_weights = postings[word]
            ids.append(i)
            id_weights.append(weight)
    arrays = {
        word: (np.array(ids), np.array(weights))
        for word, (ids, weights) in postings.items()
        if idf[word]
    }
    best = []
    for query in queries:
        dots = np.zeros(len(corpus))  # the query's own norm changes no order
        for word, n in _count_words(query).items():
            if word in arrays:
                text_ids, text_weights = arrays[word]
                dots[text_ids] += (1 + math.log(n)) * idf[word] * text_weights
        best.append(int((dots / norms).argmax()))
    return best


def _count_words(text: str) -> collections.Counter:
    return collections.Counter(re.findall(r"\w+", text.lower()))
