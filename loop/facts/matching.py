"""Whether a dialogue supports what a note states, contradicts it, or says nothing of it."""

import functools
from typing import NamedTuple

from .claims import read_claims
from .judges.index import Index
from .judges.judge_amounts import judge_amount, judge_date, judge_of_drug
from .judges.judge_conditions import judge_condition, judge_habit
from .judges.judge_drugs import judge_action, judge_drug
from .judges.judge_sides import judge_side
from .judges.nearness import weigh
from .judges.verdicts import CONTRADICTED, SUPPORTED, Verdict, key_of
from .reading.parsed import Statement
from .statements import Document

_JUDGES = {
    "diagnosis": judge_condition,
    "symptom": judge_condition,
    "finding": judge_condition,
    "habit": judge_habit,
    "drug": judge_drug,
    "allergy": judge_drug,
    "action": judge_action,
    "dose": judge_of_drug,
    "frequency": judge_of_drug,
    "side": judge_side,
    "date": judge_date,
}


class Comparison(NamedTuple):
    """The statements of a note and of its dialogue, each with what the other text says of it."""

    note: list[Verdict]
    dialogue: list[Verdict]


def compare(dialogue: str, note: str) -> Comparison:
    """Each statement of the note with its place in the dialogue, and the reverse.

    What a dialogue only asks or considers is no statement of it. Any text can be compared; the time
    is linear in the texts.
    """
    return Comparison(check(dialogue, note), _verdicts(read(note), read(dialogue).document))


def check(dialogue: str, note: str) -> list[Verdict]:
    """Each statement of the note, with its place in the dialogue."""
    spoken, written = read(dialogue), read(note).document
    return _verdicts(spoken, written) + _claims(spoken, written)


@functools.lru_cache(maxsize=16)
def read(text: str) -> Index:
    """The statements of a text; those of the last texts are kept, as each is compared often."""
    return Index(Document(text))


def _verdicts(index: Index, document: Document) -> list[Verdict]:
    """What this text says of each statement of another."""
    return [
        weigh(index, _judge(index, statement), document)
        for statement in document.statements
        if document.tells(statement)
    ]


def _claims(index: Index, document: Document) -> list[Verdict]:
    """What this text says of the other's claims whose words it uses."""
    found = []
    for claim in read_claims(document.items, document.words, document.context):
        words = [document.words[i] for i in claim.items]
        against = index.usage.against(claim.polarity, words)
        if against is None:
            continue
        first, last = claim.items[0], claim.items[-1]
        statement = Statement(
            "claim", " ".join(words), "", claim.polarity, document.context.subject[first],
            document.items[first].start, document.items[last].end, first,
        )  # fmt: skip
        if against < 0:
            found.append(Verdict(statement, SUPPORTED, None))
        else:
            item = index.document.items[against]
            found.append(Verdict(statement, CONTRADICTED, (item.start, item.end)))
    return found


def _judge(index: Index, s: Statement) -> Verdict:
    """What this text says of a statement, whatever stands around it; kept, as many are equal."""
    key = key_of(s)
    known = index.cache.get(key)
    if known is None:
        known = index.cache[key] = _JUDGES.get(s.kind, judge_amount)(index, s)
    return known._replace(statement=s)
