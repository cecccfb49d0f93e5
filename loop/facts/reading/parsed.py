"""A text that was parsed, and what a statement of it is."""

from typing import NamedTuple

from ..context import Context, read_context
from ..drugs import Drug
from ..measures.units import Amount
from ..numerals import Item, parse_items
from ..phrases import singular
from .clauses import is_speech

_END = Item("", None, 0, 0, "\n")
_PADDING = [_END] * 12  # so that matchers can look ahead


class Statement(NamedTuple):
    """One thing that a text says, at text[start:end]."""

    kind: str  # dose, duration, age, frequency, ratio, number, date, drug, side, diagnosis,
    # symptom, finding, allergy, habit or action
    value: str  # as a report shows it
    of: str  # what it belongs to: the drug of a dose, the part of a side; "" for nothing
    polarity: str  # affirmed, denied, possible, or asked
    subject: str  # patient or family
    start: int
    end: int
    word: int  # the index of its first item
    amount: Amount | None = None
    drug: Drug | None = None


class Parsed:
    """A text with its items and their context."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.items = parse_items(text)
        self.padded = self.items + _PADDING
        self.words = [singular(item.word) or str(item.number) for item in self.items]
        self.stems = [_digits(item) for item in self.items] + [""] * 12
        self.spoken = is_speech(text, self.items)
        self.context: Context = read_context(text, self.items, self.spoken)
        self.ends = [item.end for item in self.items]

    def near(self, i: int, words: frozenset[str], reach: int) -> bool:
        """Whether one of the words stands in the clause of item i, so many items away at most."""
        clause = self.context.clause
        around = range(max(0, i - reach), min(len(self.items), i + reach + 1))
        return any(clause[k] == clause[i] and self.items[k].word in words for k in around)


def _digits(item: Item) -> str:
    return f"{item.number:g}" if item.number is not None else singular(item.word)
