"""Whether a text has the sides of another, of the same parts of the body."""

from ..body import same_region
from ..reading.parsed import Statement
from .index import Index
from .verdicts import CONTRADICTED, NOT_SAID, SUPPORTED, Verdict, place_of

COMPARES = " more than "  # of the value of "left more than right"
_HANDED = frozenset("dominant write everything handedness".split())


def judge_side(index: Index, s: Statement) -> Verdict:
    """By the sides of the same part; both also by "my feet", or by left and right together."""
    if COMPARES in s.value:
        return _judge_comparison(index, s)
    same_part = [o for o in index.all("side") if COMPARES not in o.value and _may_be_of(s, o)]
    if s.of == "handedness" and not same_part and _HANDED & index.places_of_word.keys():
        same_part = [o for o in index.all("side") if o.of == "hand"]
    agreeing = [
        o
        for o in same_part
        if o.value == s.value or (o.value == "both" and (not s.of or not o.of or s.of == o.of))
    ]
    sides = {o.value for o in same_part}
    if agreeing:
        against = [o for o in same_part if {o.value, s.value} == {"left", "right"}]
        index.keep_rivals(s, agreeing, against)
        return Verdict(s, SUPPORTED, place_of(agreeing[0]))
    if s.value == "both":
        plural = [
            at
            for at, part, many in index.document.parts
            if many and (not s.of or same_region(s.of, part))
        ]
        if plural:
            item = index.document.items[plural[0]]
            return Verdict(s, SUPPORTED, (item.start, item.end))
        if {"left", "right"} <= sides:
            return Verdict(s, SUPPORTED, place_of(same_part[0]))
    if same_part:
        return Verdict(s, CONTRADICTED, place_of(same_part[0]))
    return Verdict(s, NOT_SAID, None)


def _judge_comparison(index: Index, s: Statement) -> Verdict:
    """ "Left worse than right": contradicted where the other text says the reverse alone."""
    first, _, other = s.value.partition(COMPARES)
    compared = [o for o in index.all("side") if COMPARES in o.value]
    same = [o for o in compared if o.value == s.value]
    if same:
        return Verdict(s, SUPPORTED, place_of(same[0]))
    if compared:
        return Verdict(s, CONTRADICTED, place_of(compared[0]))
    return Verdict(s, NOT_SAID if first == other else SUPPORTED, None, is_broader=True)


def _may_be_of(s: Statement, o: Statement) -> bool:
    """Whether the other side may be that of the statement's part; "bilaterally" alone is none's."""
    if not s.of or not o.of:
        return o.value != "both" or s.value == "both"
    return same_region(s.of, o.of)
