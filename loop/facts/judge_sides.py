"""Whether a text has the sides of another, of the same parts of the body."""

from .body import same_region
from .index import Index
from .parsed import Statement
from .verdicts import CONTRADICTED, NOT_SAID, SUPPORTED, Verdict, place_of

_HANDED = frozenset("dominant write everything handedness".split())


def judge_side(index: Index, s: Statement) -> Verdict:
    """By the sides of the same part; both also by "my feet", or by left and right together."""
    same_part = [o for o in index.all("side") if _may_be_of(s, o)]
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


def _may_be_of(s: Statement, o: Statement) -> bool:
    """Whether the other side may be that of the statement's part; "bilaterally" alone is none's."""
    if not s.of or not o.of:
        return o.value != "both" or s.value == "both"
    return same_region(s.of, o.of)
