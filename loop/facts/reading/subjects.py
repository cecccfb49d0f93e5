"""Whether the patient or the family has what a word names."""

import re

from ..numerals import Item
from .clauses import Clause

PATIENT, FAMILY = "patient", "family"
_FAMILY_WORDS = frozenset(
    """mother father mom dad mum mama mommy daddy brother sister aunt uncle grandmother grandfather
    grandma grandpa cousin parent sibling family familial maternal paternal brothers sisters
    mother's father's mom's dad's grandparent grandparents parents siblings sister's brother's
    aunts uncles cousins relatives relative nephew niece
    grandmother's grandfather's granny gran nana grandad granddad grandmom auntie""".split()
)
# Who speaks for a patient may call him a son or a daughter.
_OTHERS = frozenset("he she they his her their he's she's they're him them anyone else".split())
_RELATIVES = frozenset("family relatives siblings parents grandparents".split())
_ASKS_ON = frozenset("what how any and anyone anybody about".split())
# Others that fall ill; only before a verb, as many a patient lives with a wife.
_OTHER_PEOPLE = frozenset(
    """wife husband spouse partner boyfriend girlfriend fiance coworker colleague roommate neighbor
    friend boss classmate""".split()
)
_IS_ILL = frozenset("has had is was got gets tested died caught suffers suffered".split())
_CAUSED_BY = ("of", "from", "after")
# What a relative does who tells of the patient: it is no illness of his own.
_TELLS = frozenset(
    """noticed notices notes noted says said say states stated reports reported report denies deny
    denied describes described thinks think thought feels felt believes believe brought gave gives
    mentions mentioned told tells saw worried concerned""".split()
)
_TELLS_REACH = 3
_CHILDREN = frozenset(
    """son daughter sons daughters children son's daughter's kid kids grandson granddaughter
    grandchildren""".split()
)
_OWNERS = frozenset(
    """my your his her their our the patient's in of maternal paternal and or both a one 's step
    half grand other only older younger twin oldest youngest late great little big another
    have has""".split()
)
_NOT_FAMILY_NEXT = frozenset("doctor physician medicine practice practitioner planning".split())
_SELF = frozenset("i i'm i've i'd you're you've you'd myself yourself patient".split())
SELF_OR_YOU = _SELF | {"you", "your", "my"}
# What says in a note that its sentence is about the patient.
_PATIENT_WORDS = frozenset(
    """he she patient his her mr mrs ms i you personal medical past gentleman lady
    woman man male female boy girl""".split()
)
# How the lines begin that head a section of a note without a colon.
_HEADINGS = frozenset(
    """allergies assessment chief current diagnoses diagnosis exam examination hpi imaging
    impression instructions laboratory labs medication medications objective orders physical
    plan procedure procedures recommendations results review ros social subjective surgical vital
    vitals""".split()
)
_LONGEST_HEADING = 5  # words
_KINDS = frozenset(("kind", "type"))
_HE_OR_SHE = frozenset("he she they he's she's".split())
_RELATIVE_REACH = 3
_RELATIVE_SPEAKS = re.compile(
    r"^[^A-Za-z\n]*(?:guest[ _])?"
    r"(?:family|parent|mother|father|wife|husband|daughter|son|caregiver)\b[^:\n]{0,20}:",
    re.IGNORECASE | re.MULTILINE,
)


def read_spoken_subjects(text: str, items: list[Item], clauses: list[Clause]) -> list[str]:
    """The subject of each item of a dialogue; "" throughout where a relative speaks.

    What is said behind the family's members is theirs, up to a word for the patient.
    """
    subjects = [""] * len(items)
    if _RELATIVE_SPEAKS.search(text):
        return subjects
    subject = PATIENT
    asked_of_family = ""
    topic = was_asked = False  # whether the family is what is asked about, turn after turn
    since = _RELATIVE_REACH  # turns since a relative was named
    kind_asked = False  # whether the turn before asks "what kind?"
    answers = False  # what runs in the family: then "i have diabetes" says who has it of none
    for clause in clauses:
        if clause.new_turn:
            first = {item.word for item in items[clause.start : clause.start + 4]}
            asks_on = bool(first & _ASKS_ON) and not first & SELF_OR_YOU
            names_others = bool(first & _OTHERS) or (topic and (asks_on or was_asked))
            was_asked, topic = topic and asks_on, topic and (names_others or was_asked)
            if not asked_of_family and (first & SELF_OR_YOU or not names_others):
                subject = PATIENT
            elif asked_of_family:
                subject = FAMILY
            since += 1
            names_kind = kind_asked or bool(_KINDS & first)  # "what kind of cancer?"
            kind_asked = clause.asks and bool(_KINDS & first)
            goes_on = first & _HE_OR_SHE or names_kind
            if since < _RELATIVE_REACH and goes_on and not first & SELF_OR_YOU:
                subject = FAMILY  # "how did she pass? - She had lung cancer"
            answers = asked_of_family == "runs"
            asked_of_family = ""
        for i in range(clause.start, clause.end):
            word = items[i].word
            topic = topic or word in _RELATIVES
            if _is_relative(items, i):
                subject, since = FAMILY, 0
                if clause.asks:
                    topic = True
                    asked_of_family = "runs" if _runs_in_family(items, clause) else "asks"
                if i > 1 and items[i - 2].word in ("in", "of", "by"):  # "diabetes in my brother"
                    for k in range(clause.start, i):
                        subjects[k] = FAMILY
            elif subject == FAMILY and (word in _SELF or (word == "my" and i == clause.start)):
                subject = PATIENT
            elif subject == FAMILY and word == "you" and i == clause.start:
                subject = PATIENT
            subjects[i] = "" if answers and subject == PATIENT else subject
    return subjects


def _runs_in_family(items: list[Item], clause: Clause) -> bool:
    return any(item.word in ("run", "runs") for item in items[clause.start : clause.end])


def _is_relative(items: list[Item], i: int) -> bool:
    if i == 0:
        return False
    if items[i].word in _OTHER_PEOPLE:
        return _is_ill(items, i)
    if not (items[i].word in _FAMILY_WORDS or items[i].word in _CHILDREN):
        return False
    following = items[i + 1].word if i + 1 < len(items) else ""
    if items[i].word == "family" and following in _NOT_FAMILY_NEXT:
        return False
    if _tells_of(items, i):
        return False
    owned = items[i - 1].word in _OWNERS or items[i - 1].number is not None
    return owned or following == "history"


def _is_ill(items: list[Item], i: int) -> bool:
    """Whether a wife, a friend or another at item i is what the words behind are about."""
    following = items[i + 1] if i + 1 < len(items) else None
    if following is None or following.gap != "" or following.word not in _IS_ILL:
        return False
    if following.word == "died" and not (i + 2 < len(items) and items[i + 2].word in _CAUSED_BY):
        return False  # "since her husband died her headaches"
    return not _tells_of(items, i)


def _tells_of(items: list[Item], i: int) -> bool:
    """Whether the relative at item i tells of the patient: "mom has noticed a rash"."""
    for item in items[i + 1 : i + 1 + _TELLS_REACH]:
        if item.gap != "":
            return False
        if item.word in _TELLS:
            return True
    return False


def read_written_subjects(text: str, items: list[Item], clauses: list[Clause]) -> list[str]:
    """The subject of each item of a note; "" where its sentence names none."""
    subjects = [""] * len(items)
    in_section = False
    subject, sentence = "", -1
    for number, clause in enumerate(clauses):
        if clause.new_turn:
            in_section = _is_family_section(text, items, clause, in_section)
        if clause.sentence != sentence:
            sentence = clause.sentence
            subject = FAMILY if in_section else _sentence_subject(items, clauses, number)
        for i in range(clause.start, clause.end):
            word = items[i].word
            if word in _OTHER_PEOPLE and _is_ill(items, i):
                subject = FAMILY
            elif (word in _FAMILY_WORDS or word in _CHILDREN) and not _are_others(items, i):
                following = items[i + 1].word if i + 1 < len(items) else ""
                if following not in _NOT_FAMILY_NEXT and not _accompanies(items, i):
                    subject = FAMILY
                behind = i > 1 and (items[i - 1].word == "in" or items[i - 2].word == "in")
                behind = behind or following == "side"  # "migraine on the maternal side"
                if behind or (word in ("family", "side") and items[i - 1].word != "no"):
                    for k in range(clause.start, i):
                        subjects[k] = FAMILY
            elif subject == FAMILY and not in_section and word == "patient" and i > clause.start:
                subject = PATIENT
            subjects[i] = subject
    return subjects


def _are_others(items: list[Item], i: int) -> bool:
    """Whether the children at item i are nobody's in particular: "with other kids"."""
    return items[i].word in ("kid", "kids") and i > 0 and items[i - 1].word == "other"


def _accompanies(items: list[Item], i: int) -> bool:
    """Whether the relative at item i came along or speaks: "with her mother", "per his son"."""
    before = [item.word for item in items[max(0, i - 2) : i]]
    if _tells_of(items, i):
        return True
    return bool({"patient", "with", "by", "per"} & set(before)) and "lives" not in before


def _sentence_subject(items: list[Item], clauses: list[Clause], number: int) -> str:
    sentence = clauses[number].sentence
    while number < len(clauses) and clauses[number].sentence == sentence:
        clause = clauses[number]
        if any(item.word in _PATIENT_WORDS for item in items[clause.start : clause.end]):
            return PATIENT
        number += 1
    return ""


def _is_family_section(text: str, items: list[Item], clause: Clause, before: bool) -> bool:
    """Whether a line of a note stands under "Family history"."""
    words = [item.word for item in items[clause.start : min(clause.end, clause.start + 4)]]
    if words[:2] == ["family", "history"] or words[:3] == ["family", "medical", "history"]:
        return True
    line = text[items[clause.start].start :].partition("\n")[0] if before else ""
    return before and not ("history" in words or _is_heading(line))


def _is_heading(line: str) -> bool:
    """Whether a line heads a section: with a colon, or as "PHYSICAL EXAM" does."""
    words = line.lower().split()
    if ":" in line or not words:
        return ":" in line
    is_short = len(words) <= _LONGEST_HEADING and line.rstrip()[-1] not in ".,;"
    return is_short and words[0] in _HEADINGS
