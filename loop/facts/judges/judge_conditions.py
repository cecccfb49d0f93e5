"""Whether a text has the conditions and habits that another states."""

import os.path

from ..body import same_region
from ..conditions import EXAMS_OF, KIND_OF, SCATTERED
from ..reading.parsed import Statement
from ..reading.polarity import AFFIRMED, CURRENT, DENIED, ENDED, FORMER, NORMAL
from ..reading.subjects import FAMILY, PATIENT
from .index import MOST_RIVALS, Index
from .verdicts import CONTRADICTED, NOT_SAID, SUPPORTED, Verdict, place_of

_GENERAL = ("cancer", "tumor")  # they support no special one
_ALIKE: dict[str, tuple[str, ...]] = dict.fromkeys(
    (FORMER, ENDED), (AFFIRMED, CURRENT, FORMER, ENDED)
)
_ALIKE |= {AFFIRMED: (AFFIRMED, CURRENT, FORMER), CURRENT: (AFFIRMED, CURRENT)}
_ABUSES = {"alcohol": "alcohol abuse", "drugs": "substance abuse"}
_OPPOSITE = {AFFIRMED: (DENIED, ENDED), DENIED: (AFFIRMED, CURRENT), FORMER: (DENIED,)}
_OPPOSITE |= {CURRENT: (DENIED, ENDED, FORMER)}
_SO_CALLED = ("fever", "any allergy")  # their weak names, denied, deny them: "feel hot? - No"
_COMMON_NAMES = frozenset("disease disorder syndrome chronic difficulty problem".split())


def judge_condition(index: Index, s: Statement) -> Verdict:
    """By its name or a broader one, a normal examination, a slip of the pen, or in two words."""
    mentions = index.conditions.get(s.value, [])
    if s.value == "any allergy":
        allergies = [o for o in index.all("allergy") if o.polarity == AFFIRMED]
        if s.polarity == DENIED and allergies and all(o.polarity != DENIED for o in mentions):
            return Verdict(s, CONTRADICTED, place_of(allergies[0]))
        mentions = mentions + index.all("allergy") + index.conditions.get("rhinitis", [])
    if s.value == "tenderness":
        mentions = _tender(index, s, mentions)
    if mentions and any(o.polarity != NORMAL for o in mentions):
        return by_polarity(index, s, mentions)
    if mentions:  # "a stone", which may be any
        scattered = _scattered(index, s)
        return by_polarity(index, s, [scattered] if scattered else mentions)
    general = KIND_OF.get(s.value)
    if (
        general
        and general in index.conditions
        and (general not in _GENERAL or s.value == "malignancy")
        and (s.polarity != DENIED or any(o.polarity != AFFIRMED for o in index.conditions[general]))
    ):
        return by_polarity(index, s, index.conditions[general])._replace(is_broader=True)
    if s.polarity == DENIED and _is_normal(index, s.value):
        return Verdict(s, SUPPORTED, None, is_broader=True)
    otherwise = misspelled(index, s) or _scattered(index, s)
    return by_polarity(index, s, [otherwise]) if otherwise else Verdict(s, NOT_SAID, None)


def _tender(index: Index, s: Statement, mentions: list[Statement]) -> list[Statement]:
    """The mentions of tenderness, and of pain where it is affirmed; none of another part."""
    if s.polarity == AFFIRMED:
        mentions = mentions + [o for o in index.conditions.get("pain", []) if o.value == "pain"]
    if not s.of:
        return mentions
    return [
        o
        for o in mentions
        if (o.of and same_region(s.of, o.of)) or (not o.of and o.polarity == s.polarity)
    ]


def judge_habit(index: Index, s: Statement) -> Verdict:
    """By the mentions of tobacco, alcohol or drugs, and of their abuse."""
    habits = [o for o in index.all("habit") if o.value == s.value]
    habits += index.conditions.get(_ABUSES.get(s.value, ""), [])
    habits = [o._replace(subject="") for o in habits]  # whoever has the habit
    return by_polarity(index, s._replace(subject=""), habits)._replace(statement=s)


def by_polarity(index: Index, s: Statement, mentions: list[Statement]) -> Verdict:
    """What the mentions of a thing say of a statement of it.

    Explicit mentions of the same part count before others, and before questions.
    """
    if not mentions:
        return Verdict(s, NOT_SAID, None)
    subject = s.subject or PATIENT
    mentions_of = [o for o in mentions if not o.subject or o.subject == subject]
    if not s.subject and not (s.polarity == DENIED and mentions_of):
        is_family = s.polarity == FORMER and all(o.subject == FAMILY for o in mentions)
        mentions_of = [] if is_family else mentions  # "history of diabetes" is the patient's
    if not mentions_of:
        denied = s.polarity == DENIED and any(o.polarity == DENIED for o in mentions)
        return Verdict(s, SUPPORTED if denied else CONTRADICTED, place_of(mentions[0]), denied)
    mentions = mentions_of
    is_broader = False
    if s.of:
        near = [o for o in mentions if o.of and same_region(s.of, o.of)]
        is_broader = not near
        if not any(o.polarity in _ALIKE.get(s.polarity, (s.polarity,)) for o in near):
            near += [o for o in mentions if not o.of]
        mentions = near or mentions
    same = [o for o in mentions if o.polarity in _ALIKE.get(s.polarity, (s.polarity,))]
    if s.polarity == DENIED and not same:
        same = [o for o in mentions if o.polarity == ENDED]
    if s.polarity == DENIED and not same:
        same = [o for o in mentions if o.polarity == NORMAL]
    opposite = _OPPOSITE.get(s.polarity, ())
    against = [
        o
        for o in mentions
        if o.polarity in opposite and o.kind != "weak" and _denies_as_much(s, o, mentions)
    ]
    whole = [o for o in against if o.value == s.value and o.polarity == AFFIRMED]
    narrower = all(o.value != s.value for o in same)
    if (s.value, s.polarity) == ("pain", DENIED) and whole and narrower:
        return Verdict(s, CONTRADICTED, place_of(whole[0]))  # "no tenderness" denies no pain
    if s.polarity == AFFIRMED and same and narrower and s.kind == "symptom":
        is_pain = s.value in ("pain", "tenderness")
        own = [o for o in against if o.value == s.value and not is_pain]
        if own:
            return Verdict(s, CONTRADICTED, place_of(own[0]))  # "tingling, but not numb"
    if same:
        index.keep_rivals(s, same, against)
        return Verdict(s, SUPPORTED, place_of(same[0]), is_broader)
    if against:
        return Verdict(s, CONTRADICTED, place_of(against[0]))
    weak = [o for o in mentions if o.kind == "weak" and o.polarity == DENIED]
    if s.polarity == AFFIRMED and len(weak) == len(mentions) and s.value in _SO_CALLED:
        return Verdict(s, CONTRADICTED, place_of(weak[0]))  # "feel hot? - No"
    if all(o.polarity == NORMAL for o in mentions):
        return Verdict(s, NOT_SAID, place_of(mentions[0]))
    return Verdict(s, SUPPORTED, place_of(mentions[0]), is_broader)


def _denies_as_much(s: Statement, o: Statement, mentions: list[Statement]) -> bool:
    """Whether a mention of the opposite polarity is about all that a statement is about.

    "No pain in your jaw" denies no pain elsewhere, and "no migraine" no headache. Tenderness is
    pain, but contradicts "no pain" only where pain itself is not spoken of.
    """
    if s.polarity == DENIED:
        if o.value == s.value:
            return True
        return KIND_OF.get(s.value) != o.value and all(m.value != s.value for m in mentions)
    if s.polarity == AFFIRMED and o.of and not s.of:
        return False
    return o.value == s.value or KIND_OF.get(s.value) == o.value or o.kind == "habit"


def _scattered(index: Index, s: Statement) -> Statement | None:
    """What the statement names, with words between: "lumps in her breast"."""
    clause = index.document.context.clause
    for words in SCATTERED.get(s.value, ()):
        places = [index.places_of_word.get(word, [])[:MOST_RIVALS] for word in words]
        if not all(places):
            continue
        for i in places[0]:
            if all(any(_beside(clause, i, k) for k in others) for others in places[1:]):
                return _at(index, s, i)
    return None


def _at(index: Index, s: Statement, i: int) -> Statement:
    """The statement as item i makes it."""
    context, item = index.document.context, index.document.items[i]
    s = s._replace(of="", start=item.start, end=item.end, word=i)
    return s._replace(polarity=context.polarity[i], subject=context.subject[i])


def misspelled(index: Index, s: Statement) -> Statement | None:
    """What the statement names, where the document has it in a slip of the pen: "carpel"."""
    names = [word for word in s.value.split() if word not in _COMMON_NAMES]
    found = [_nearly(index, word) for word in names]
    if not found or None in found or all(name in index.places_of_word for name in names):
        return None
    return _at(index, s, found[0] or 0)


def _nearly(index: Index, name: str) -> int | None:
    """The first item that is the word, or nearly so and no other known word."""
    if name in index.places_of_word:
        return index.places_of_word[name][0]
    for word in index.document.unknown.get(name[:2], ()):
        if _is_slip(name, word):
            return index.places_of_word[word][0]
    return None


def _is_normal(index: Index, name: str) -> bool:
    """Whether an examination that would have found it was normal, or denies the like."""
    exams = EXAMS_OF.get(name, ())
    return bool(exams) and ("all" in index.normal or any(e in index.normal for e in exams))


def _beside(clause: list[int], i: int, k: int) -> bool:
    return 0 < abs(k - i) < 6 and clause[k] == clause[i]


def _is_slip(name: str, word: str) -> bool:
    """Whether two words differ by a letter, or by up to two next to each other in a long one."""
    most = 2 if len(name) > 8 else 1
    if abs(len(name) - len(word)) > most or min(len(name), len(word)) < 6:
        return False
    start = len(os.path.commonprefix((name, word)))
    end = len(os.path.commonprefix((name[start:][::-1], word[start:][::-1])))
    return max(len(name), len(word)) - start - end <= most
