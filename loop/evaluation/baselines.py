"""Scores notes beside baselines that they have to beat on the same examples.

The baselines are the dialogue taken as the note, and the note of the most similar training
dialogue. The reference taken as the note is the best that can be reached.
"""

import collections
import functools
import itertools
import math
import re

import numpy as np

from ..config.schema import TaskConfig
from ..data.conversations import Conversation, dialogue_text, note_text
from ..data.parallel import in_chunks, map_chunks
from ..data.soap import SOAP
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..generation.decode import Note
from .scoring import Row, score_note, summarise

ROWS_AT_A_TIME = 2  # that a process scores; a long note takes a second


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
    by_row = list(zip(*systems.values()))  # so a dialogue is read once
    score = functools.partial(_score_rows, task)
    found = map_chunks(score, in_chunks(by_row, ROWS_AT_A_TIME), on_all_ranks=True)
    scored = itertools.chain.from_iterable(found)
    shards = ranks.all_gather_json(dict(zip(systems, map(list, zip(*scored)))))
    scores = {
        name: [shards[i % ranks.world_size][name][i // ranks.world_size] for i in range(len(rows))]
        for name in systems
    }
    return rows, summarise(scores, task)


def _score_rows(task: TaskConfig, rows: list[tuple[Row, ...]]) -> list[list[dict]]:
    """The scores of each system's note, for each row."""
    return [[score_note(row, task) for row in systems] for systems in rows]


def rows_of(conversations: list[Conversation], notes: dict[str, Note]) -> list[Row]:
    """What is scored, in the order of the ids. notes: the note of each conversation, by id."""
    return [
        Row(c.id, dialogue_text(c), note_text(c), *notes[c.id])
        for c in sorted(conversations, key=lambda c: c.id)
    ]


def most_similar(queries: list[str], corpus: list[str]) -> list[int]:
    """For each query, the index of the text of the corpus with the highest TF-IDF cosine.

    Of equal texts it is the first.
    """
    index = TfIdfIndex(corpus)
    return [index.most_similar(query) for query in queries]


class TfIdfIndex:
    """The words of a corpus of n texts. A word weighs (1 + log tf) log(n / df) in a text."""

    def __init__(self, corpus: list[str]) -> None:
        self.num_texts = len(corpus)
        self.numbers: dict[str, int] = {}  # of each word, as it first occurs
        words: list[int] = []  # of one text after the other, each once
        counts: list[int] = []  # how often the text has it
        sizes = []  # of texts, in distinct words
        for text in corpus:
            count = _count_words(text)
            words += [self.numbers.setdefault(word, len(self.numbers)) for word in count]
            counts += count.values()
            sizes.append(len(count))
        word = np.array(words, np.int64)
        text_of = np.repeat(np.arange(len(corpus)), sizes)
        self.frequency = np.bincount(word, minlength=len(self.numbers))  # texts that hold a word
        self.idf = np.array([math.log(len(corpus) / n) for n in self.frequency.tolist()])
        log = np.array([0.0, *(1 + math.log(n) for n in range(1, max(counts, default=0) + 1))])
        weights = log[np.array(counts, np.int64)] * self.idf[word]
        self.norms = np.sqrt(np.bincount(text_of, weights * weights, len(corpus)))
        self.norms[self.norms == 0] = 1.0
        # The postings of word i, its texts and weights there, end at ends[i].
        by_word = np.argsort(word, kind="stable")
        self.ends = np.cumsum(self.frequency)
        self.text_of = text_of[by_word]
        self.weights = weights[by_word]

    def most_similar(self, query: str) -> int:
        """The index of the text with the highest cosine; of equal texts the first."""
        dots = np.zeros(self.num_texts)  # the query's own norm changes no order
        for word, n in _count_words(query).items():
            i = self.numbers.get(word)
            if i is not None and self.idf[i]:
                postings = slice(self.ends[i] - self.frequency[i], self.ends[i])
                weight = (1 + math.log(n)) * self.idf[i]
                dots[self.text_of[postings]] += weight * self.weights[postings]
        return int((dots / self.norms).argmax())


def _count_words(text: str) -> collections.Counter:
    return collections.Counter(re.findall(r"\w+", text.lower()))
