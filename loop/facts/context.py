"""Who a word is about, and whether it is affirmed: rules after ConText (Harkema et al. 2009).

A text is cut into clauses. A trigger ("denies", "no", "if", "my mother") holds for the words behind
it in its clause. What a question asks takes its polarity from the answer in the next turn.
"""

from typing import NamedTuple

from .numerals import Item
from .reading.answers import answer_questions
from .reading.clauses import read_clauses
from .reading.polarity import AFFIRMED, read_polarity
from .reading.subjects import read_spoken_subjects, read_written_subjects


class Context(NamedTuple):
    """The polarity, subject and sentence of each item of a text."""

    polarity: list[str]
    subject: list[str]  # patient or family; "" where a note names none, or a relative speaks
    sentence: list[int]
    clause: list[int]
    turn: list[int]
    asks: list[bool]  # whether it stands in a question


def read_context(text: str, items: list[Item], spoken: bool) -> Context:
    """The context of each item. spoken: the text is a dialogue, with questions and answers."""
    count = len(items)
    clauses = read_clauses(text, items, spoken)
    if spoken:
        subject = read_spoken_subjects(text, items, clauses)
    else:
        subject = read_written_subjects(text, items, clauses)
    sentence, part, turns = ([0] * count for _ in range(3))
    polarity, asks = [AFFIRMED] * count, [False] * count
    context = Context(polarity, subject, sentence, part, turns, asks)
    carried = AFFIRMED  # over the border to a clause behind "I don't think"
    turn = -1
    for number, clause in enumerate(clauses):
        turn += clause.new_turn
        for i in range(clause.start, clause.end):
            context.sentence[i], context.clause[i] = clause.sentence, number
            context.turn[i], context.asks[i] = turn, clause.asks
        carried = read_polarity(items, clause, spoken, carried, context.polarity)
    if spoken:
        answer_questions(items, clauses, context.polarity)
    return context
