"""Who a word is about, and whether it is affirmed: rules after ConText (Harkema et al. 2009).

A text is cut into clauses, also where speech was written down without punctuation. A trigger
("denies", "no", "if", "my mother") holds for the words behind it in its clause. What a question
asks takes its polarity from the answer in the next turn.
"""

import bisect
import re
from typing import NamedTuple

from .numerals import Item, count_speakers

AFFIRMED, DENIED, POSSIBLE, ASKED = "affirmed", "denied", "possible", "asked"
FORMER = "former"  # "history of", "quit"
ENDED = "ended"  # "resolved", and in speech what is denied with "still" or "no more"
NORMAL = "normal"  # of what may be normal or not, such as "blood pressure"
PATIENT, FAMILY = "patient", "family"

_NO = frozenset(
    """no denies denied deny denying without not never neither nor negative absent absence cannot
    n't nt free lacks nope ruled none nothing nobody""".split()
)
_POSSIBLE = frozenset(
    """possible possibly probable probably likely suspect suspected suspicion may might maybe
    could perhaps if concern concerning concerned rule consider considering questionable versus vs
    whether worried risk risks prevent should watch unlikely unless in-case avoid""".split()
)
_FAMILY_WORDS = frozenset(
    """mother father mom dad mum mama mommy daddy brother sister aunt uncle grandmother grandfather
    grandma grandpa cousin parent sibling family familial maternal paternal brothers sisters
    mother's father's mom's dad's grandparent grandparents parents siblings sister's brother's
    aunts uncles cousins relatives relative nephew niece
    grandmother's grandfather's""".split()
)
# Who speaks for a patient may call him a son or a daughter.
_OTHERS = frozenset("he she they his her their he's she's they're him them anyone else".split())
_RELATIVES = frozenset("family relatives siblings parents grandparents".split())
_ASKS_ON = frozenset("what how any and anyone anybody about".split())
_CHILDREN = frozenset("son daughter sons daughters children son's daughter's".split())
_OWNERS = frozenset(
    """my your his her their our the patient's in of maternal paternal and or both a one 's step
    half grand other only older younger twin oldest youngest late great little big""".split()
)
_NOT_FAMILY_NEXT = frozenset("doctor physician medicine practice practitioner planning".split())
_SELF = frozenset("i i'm i've i'd you're you've you'd myself yourself patient".split())
_SELF_OR_YOU = _SELF | {"you", "your", "my"}
# What says in a note that its sentence is about the patient.
_PATIENT_WORDS = frozenset(
    """he she patient his her mr mrs ms i you personal medical past gentleman lady
    woman man male female boy girl""".split()
)
# Words that begin another clause.
_BREAKS = frozenset(
    """but however although though because except yet which apart aside whereas
    nevertheless""".split()
)
_WRITTEN_BREAKS = frozenset(
    """reports reported endorses endorsed states stated complains admits admitted presents notes
    explains positive remarkable significant believes continues describes confirms
    acknowledges mentions exception""".split()
)
# They end a negation: "no cough due to asthma", "no medicine for her asthma".
_RESETS = frozenset(
    """due secondary despite since until during after before when while following upon because
    prompting""".split()
)
# Behind a comma, they begin another clause of a note.
_AFTER_COMMA = frozenset("he she they the his her it smokes drinks uses lives works takes".split())
_SPOKEN_BREAKS = frozenset("so okay ok alright well now then and-then anyway".split())
_SUBJECTS = frozenset(
    """i you he she we they it there i'm i've i'd you're you've he's she's it's there's we're
    they're we'll i'll you'll it'll that's""".split()
)
# Behind these a subject belongs to the same clause.
_LINKS = frozenset(
    """if when whether that think thought believe say says said know where how why who as than
    while after before until unless since like what see sure""".split()
)
_AUXILIARIES = frozenset(
    """do does did have has had are is was were can could would will should am have-n't
    don't doesn't didn't haven't hasn't aren't isn't wasn't""".split()
)
_COPULAS = frozenset("is are was were looks look sounds sound feels".split())
# What a noun's clause goes on from.
_BEFORE_NOUN = frozenset(
    """the a an my your his her their our this that these those any some no all and or of in on with
    which who what there here how where when it he she we they you everything""".split()
)
_TESTS = frozenset("test tests result screen swab hiv covid strep flu mono".split())
_BEHIND_ANSWER = frozenset(("no", "yeah", "yes", "nothing", "not", "okay", "i", "just", "it"))
_ASKERS = frozenset(_SUBJECTS | {"anyone", "anybody", "anything", "your", "the", "that", "this"})
_THOUGHTS = frozenset("think believe feel suppose recall remember know notice noticed see".split())
_BEHIND_NO = frozenset(
    """change changes only doubt problem problems matter further sure worries idea just
    necessarily""".split()
)
_THESE = frozenset("her his my this your the".split())
# "It did not relieve the pain" and "risks are not limited to pain" deny no pain.
_LEFT_AS_IT_IS = frozenset(
    """relieve relieved relieving help helped helping improve improved improving improvement
    alleviate alleviated resolve resolved control controlled limited relief touch ease eased know
    knows sure certain remember tolerate tolerated tolerating manage managed worked work clear
    explain""".split()
)
_SOME = frozenset("some slight slightly mild mildly minimal positive just only occasional".split())
_FOUND = frozenset(
    """identified seen present noted appreciated found evident detected visualized reported
    palpable observed demonstrated""".split()
)
_YES = frozenset(
    """yes yeah yep yup correct definitely absolutely exactly sometimes occasionally uh-huh mm-hmm
    little unfortunately true certainly some mhm mm lot ya yah often usually always""".split()
)
_ANSWERS = frozenset("no nope yes yeah yep yup none never".split())
_FILLERS = frozenset(
    """um uh well oh okay ok so i you know mean doctor ah hmm alright and like actually right sir
    ma'am just it's think that it really""".split()
)
_OWN_VERBS = frozenset("do did have has does am".split())
# One word in so many of what is spoken is one of these, ends a question or names who speaks.
_SPEECH_WORDS = frozenset(
    """i i'm i've you you're your my me yeah yes okay ok um uh hi hello thank thanks mm
    hmm""".split()
)
_SPEECH_SHARE = 20
_RELATIVE_SPEAKS = re.compile(
    r"^[^A-Za-z\n]*(?:guest[ _])?"
    r"(?:family|parent|mother|father|wife|husband|daughter|son|caregiver)\b[^:\n]{0,20}:",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = frozenset(".!?\n\u2022;")
_MAX_SPOKEN_REACH, _MAX_WRITTEN_REACH = 16, 60
_POSSIBLE_REACH = 12
_LIST_REACH = 6
_ANSWER_REACH = 14  # items of an answer that are read
_SHORT_TURN = 8  # items of a question without a question mark, at most


def is_speech(text: str, items: list[Item]) -> bool:
    """Whether a text is a dialogue rather than a note, by its speakers or by how it speaks.

    A text is always read as the same kind, whichever text it is compared with: so it supports
    itself.
    """
    speaking = sum((item.word in _SPEECH_WORDS) + (item.gap == "?") for item in items)
    speaking += text.rstrip().endswith("?")
    return (speaking + count_speakers(text)) * _SPEECH_SHARE > len(items)


class Context(NamedTuple):
    """The polarity, subject and sentence of each item of a text."""

    polarity: list[str]
    subject: list[str]  # patient or family; "" where a note names none, or a relative speaks
    sentence: list[int]
    clause: list[int]
    turn: list[int]
    asks: list[bool]  # whether it stands in a question


class _Clause(NamedTuple):
    start: int
    end: int
    sentence: int
    new_turn: bool
    asks: bool


def read_context(text: str, items: list[Item], spoken: bool) -> Context:
    """The context of each item. spoken: the text is a dialogue, with questions and answers."""
    count = len(items)
    sentence, part, turns = ([0] * count for _ in range(3))
    polarity, subject = [AFFIRMED] * count, [PATIENT] * count
    context = Context(polarity, subject, sentence, part, turns, [False] * count)
    clauses = _clauses(text, items, spoken)
    carried = AFFIRMED  # over the border to a clause behind "I don't think"
    turn = -1
    for number, clause in enumerate(clauses):
        turn += clause.new_turn
        for i in range(clause.start, clause.end):
            context.sentence[i], context.clause[i] = clause.sentence, number
            context.turn[i], context.asks[i] = turn, clause.asks
        carried = _read_polarity(items, clause, spoken, carried, context)
    if spoken:
        if _RELATIVE_SPEAKS.search(text):
            context.subject[:] = [""] * count
        else:
            _read_spoken_subjects(items, clauses, context)
        _answer_questions(items, clauses, context)
    else:
        _read_written_subjects(text, items, clauses, context)
    return context


def _clauses(text: str, items: list[Item], spoken: bool) -> list[_Clause]:
    starts = []
    for i, item in enumerate(items):
        if i == 0 or item.gap in _SENTENCE or _begins_clause(items, i, spoken):
            starts.append(i)
    clauses = []
    sentence = -1
    for start, end in zip(starts, [*starts[1:], len(items)]):
        first = start == 0 or items[start].gap in _SENTENCE
        sentence += first
        asks = spoken and _asks(text, items, start, end)
        clauses.append(_Clause(start, end, sentence, start == 0 or items[start].gap == "\n", asks))
    return clauses


def _begins_clause(items: list[Item], i: int, spoken: bool) -> bool:
    word, previous = items[i].word, items[i - 1].word
    if word in _BREAKS:
        return not (word == "but" and i + 2 < len(items) and items[i + 2].word == "limited")
    if not spoken:
        if word in ("denies", "denied"):
            return i + 1 < len(items) and items[i + 1].gap not in _SENTENCE  # "alcohol, denies."
        if word in _WRITTEN_BREAKS:
            return previous not in ("no", "not", "any", "without")
        if previous == "and" and word in ("he", "she", "they"):
            return True
        return items[i].gap == "," and word in _AFTER_COMMA
    if word in _SPOKEN_BREAKS:
        return True
    if word in ("no", "yes", "yeah", "nope") and _answers_itself(items, i):
        return True
    following = items[i + 1].word if i + 1 < len(items) else ""
    if word in _AUXILIARIES and following in _SUBJECTS and previous not in _LINKS:
        return previous not in _SUBJECTS
    if previous in _LINKS:
        return False
    if following in _COPULAS and i + 2 < len(items) and items[i + 2].word in _FOUND:
        return not any(item.word in _NO for item in items[max(0, i - 4) : i])
    together = i + 1 < len(items) and items[i + 1].gap == ""
    if (
        following in _COPULAS and together and word not in _SUBJECTS
    ):  # "no drift sensation is intact"
        return previous not in _BEFORE_NOUN and previous not in _NO and word not in _BEFORE_NOUN
    if word == "your":
        return any(item.word in _COPULAS or item.word == "exam" for item in items[i + 1 : i + 4])
    if word not in _SUBJECTS:
        return False
    return previous not in _AUXILIARIES and previous not in ("n't", "not", "or")


def _answers_itself(items: list[Item], i: int) -> bool:
    """Whether the word at item i answers a question before it: "any chest pain no no"."""
    following = items[i + 1] if i + 1 < len(items) else None
    return following is None or following.gap != "" or following.word in _BEHIND_ANSWER


def _asks(text: str, items: list[Item], start: int, end: int) -> bool:
    """Whether a clause is a question."""
    behind = items[end].start if end < len(items) else len(text)
    if "?" in text[items[end - 1].end : behind]:
        return True
    words = [item.word for item in items[start:end]]
    for k, word in enumerate(words[:4]):
        following = words[k + 1] if k + 1 < len(words) else ""
        if word in _AUXILIARIES and following in _ASKERS:
            return k == 0 or words[k - 1] not in _SUBJECTS
        if (word, following) in (("how", "about"), ("what", "about"), ("how", "is")):
            return True
        if word in ("any", "anything") and not _NO & set(words[:k]):
            return "if" not in words[:k]
    if "any" in words:
        before = words[: words.index("any")]
        return not any(w in _NO or w in _POSSIBLE or w.endswith("n't") for w in before)
    return False


def _read_polarity(
    items: list[Item], clause: _Clause, spoken: bool, carried: str, context: Context
) -> str:
    """Sets the polarity of the clause's items; returns what the next clause begins with."""
    polarity = carried if not clause.new_turn else AFFIRMED
    reach = clause.start + (6 if carried != AFFIRMED else 0)
    limit = _MAX_SPOKEN_REACH if spoken else _MAX_WRITTEN_REACH
    start = clause.start
    for i in range(clause.start, clause.end):
        word = items[i].word
        if i >= reach or (polarity == DENIED and _ends_negation(items, i)):
            polarity = AFFIRMED
        if i and items[i - 1].word == "non":  # "non-tender"
            context.polarity[i] = DENIED
            continue
        if word in _NO or word.endswith("n't"):
            if _is_behind(items, i, clause):
                for k in range(start, i):
                    context.polarity[k] = DENIED
            elif not _negates_nothing(items, i, clause, spoken):
                polarity, reach = DENIED, min(clause.end, i + limit)
                if i + 1 < clause.end and items[i + 1].word == "longer":
                    polarity = FORMER
        elif (word in _POSSIBLE or _is_if_needed(items, i)) and polarity != DENIED:
            polarity, reach = POSSIBLE, min(clause.end, i + _POSSIBLE_REACH)
        if items[i].gap == "," and (spoken or word != "and"):
            start = i
        if polarity == DENIED and (items[i].gap == "," or word in ("or", "any")):
            reach = min(clause.end, max(reach, i + _LIST_REACH))  # a list goes on
        context.polarity[i] = polarity
    last = [item.word for item in items[max(clause.start, clause.end - 3) : clause.end]]
    if spoken and polarity != AFFIRMED and (_THOUGHTS & set(last) or last[-1:] == ["if"]):
        return polarity
    return AFFIRMED


def _is_if_needed(items: list[Item], i: int) -> bool:
    """Whether what follows is what something is taken for: "as needed for pain"."""
    return items[i].word in ("needed", "prn") and i + 1 < len(items) and items[i + 1].word == "for"


def _ends_negation(items: list[Item], i: int) -> bool:
    word, following = items[i].word, items[i + 1].word if i + 1 < len(items) else ""
    if word in _SOME:
        return items[i - 1].word not in _NO
    if word == "as" and following in ("the", "he", "she", "patient"):
        return True
    return word in _RESETS or (word == "for" and following in _THESE)


def _is_behind(items: list[Item], i: int, clause: _Clause) -> bool:
    """Whether the negation at item i denies what stands before it: "rebound is absent"."""
    word = items[i].word
    following = items[i + 1].word if i + 1 < clause.end else ""
    if word == "not":
        later = items[i + 2].word if i + 2 < clause.end else ""
        return following in _FOUND and later not in ("prior", "before", "until")
    if word == "ruled":
        return following == "out"
    if word in ("negative", "absent", "none", "denies", "denied", "never"):
        return not following or following in ("bilaterally", "today", "in", "on", "and", "at")
    return False


def _negates_nothing(items: list[Item], i: int, clause: _Clause, spoken: bool) -> bool:
    """Whether the word at item i is an answer, or belongs to "no longer" and the like."""
    word = items[i].word
    following = items[i + 1] if i + 1 < clause.end else None
    if following is None:
        return word != "n't"
    if following.word == "more":
        return i + 2 < clause.end and items[i + 2].word == "than"
    if following.word in _BEHIND_NO or following.word in _LEFT_AS_IT_IS:
        return True
    if following.word.endswith("ly") or following.word in ("significant", "much", "really"):
        return i + 2 < clause.end and items[i + 2].word in _LEFT_AS_IT_IS
    if word == "free":
        return following.word != "of"
    if word == "negative" and spoken:
        tested = {item.word for item in items[i + 1 : i + 4]} & _TESTS
        return following.word not in ("for", "any") and not tested
    if word == "no" and spoken:  # an answer: "no , i have pain"
        return following.gap == "," or following.word in _SUBJECTS | {"no", "not"}
    return word in ("none", "ruled", "nope")


def _read_spoken_subjects(items: list[Item], clauses: list[_Clause], context: Context) -> None:
    """Gives the family what is said behind its members, up to a word for the patient."""
    subject = PATIENT
    asked_of_family = ""
    topic = was_asked = False  # whether the family is what is asked about, turn after turn
    answers = False  # what runs in the family: then "i have diabetes" says who has it of none
    for clause in clauses:
        if clause.new_turn:
            first = {item.word for item in items[clause.start : clause.start + 4]}
            asks_on = bool(first & _ASKS_ON) and not first & _SELF_OR_YOU
            names_others = bool(first & _OTHERS) or (topic and (asks_on or was_asked))
            was_asked, topic = topic and asks_on, topic and (names_others or was_asked)
            if not asked_of_family and (first & _SELF_OR_YOU or not names_others):
                subject = PATIENT
            elif asked_of_family:
                subject = FAMILY
            answers = asked_of_family == "runs"
            asked_of_family = ""
        for i in range(clause.start, clause.end):
            word = items[i].word
            topic = topic or word in _RELATIVES
            if _is_relative(items, i):
                subject = FAMILY
                if clause.asks:
                    topic = True
                    asked_of_family = "runs" if _runs_in_family(items, clause) else "asks"
                if i > 1 and items[i - 2].word in ("in", "of", "by"):  # "diabetes in my brother"
                    for k in range(clause.start, i):
                        context.subject[k] = FAMILY
            elif subject == FAMILY and (word in _SELF or (word == "my" and i == clause.start)):
                subject = PATIENT
            elif subject == FAMILY and word == "you" and i == clause.start:
                subject = PATIENT
            context.subject[i] = "" if answers and subject == PATIENT else subject


def _runs_in_family(items: list[Item], clause: _Clause) -> bool:
    return any(item.word in ("run", "runs") for item in items[clause.start : clause.end])


def _is_relative(items: list[Item], i: int) -> bool:
    if i == 0 or not (items[i].word in _FAMILY_WORDS or items[i].word in _CHILDREN):
        return False
    following = items[i + 1].word if i + 1 < len(items) else ""
    if items[i].word == "family" and following in _NOT_FAMILY_NEXT:
        return False
    owned = items[i - 1].word in _OWNERS or items[i - 1].number is not None
    return owned or following == "history"


def _read_written_subjects(
    text: str, items: list[Item], clauses: list[_Clause], context: Context
) -> None:
    """The subject of each word of a note; "" where its sentence names none."""
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
            if word in _FAMILY_WORDS or word in _CHILDREN:
                following = items[i + 1].word if i + 1 < len(items) else ""
                if following not in _NOT_FAMILY_NEXT and not _accompanies(items, i):
                    subject = FAMILY
                behind = i > 1 and (items[i - 1].word == "in" or items[i - 2].word == "in")
                if behind or (word in ("family", "side") and items[i - 1].word != "no"):
                    for k in range(clause.start, i):
                        context.subject[k] = FAMILY
            elif subject == FAMILY and not in_section and word == "patient" and i > clause.start:
                subject = PATIENT
            context.subject[i] = subject


def _accompanies(items: list[Item], i: int) -> bool:
    """Whether the relative at item i came along or speaks: "with her mother", "per his son"."""
    before = [item.word for item in items[max(0, i - 2) : i]]
    return bool({"patient", "with", "by", "per"} & set(before)) and "lives" not in before


def _sentence_subject(items: list[Item], clauses: list[_Clause], number: int) -> str:
    sentence = clauses[number].sentence
    while number < len(clauses) and clauses[number].sentence == sentence:
        clause = clauses[number]
        if any(item.word in _PATIENT_WORDS for item in items[clause.start : clause.end]):
            return PATIENT
        number += 1
    return ""


def _is_family_section(text: str, items: list[Item], clause: _Clause, before: bool) -> bool:
    """Whether a line of a note stands under "Family history"."""
    words = [item.word for item in items[clause.start : min(clause.end, clause.start + 4)]]
    if words[:2] == ["family", "history"] or words[:3] == ["family", "medical", "history"]:
        return True
    line = text[items[clause.start].start :].partition("\n")[0] if before else ""
    is_header = ":" in line or "history" in words
    return before and not is_header


def _answer_questions(items: list[Item], clauses: list[_Clause], context: Context) -> None:
    """Gives what a turn asks for the polarity of the answer in the next turn."""
    turns: list[list[_Clause]] = []
    for clause in clauses:
        if clause.new_turn:
            turns.append([])
        turns[-1].append(clause)
    for turn, following in zip(turns, [*turns[1:], []]):
        answer = _answer(items, following)
        asked = [clause for clause in turn if clause.asks]
        short = turn[-1].end - turn[0].start <= _SHORT_TURN
        first_person = {item.word for item in items[turn[0].start : turn[-1].end]} & _SELF_OR_YOU
        short = short and not first_person & {"i", "my", "i'm", "i've"}
        if not asked and short and answer != ASKED and _answer(items, turn) == ASKED:
            asked = turn  # "nausea vomiting", without a question mark
        for clause in asked:
            behind = bisect.bisect_left(turn, clause.end, key=lambda c: c.start)
            own = _answer(items, turn[behind : behind + _ANSWER_REACH])
            first = items[clause.end].word if own != ASKED else ""
            given = own if first in _ANSWERS else answer
            for i in range(clause.start, clause.end):
                if context.polarity[i] == AFFIRMED or given == AFFIRMED:
                    context.polarity[i] = given


def _answer(items: list[Item], turn: list[_Clause]) -> str:
    """What a turn answers: affirmed, denied, or asked where that stays open."""
    if not turn:
        return ASKED
    seen = 0
    for i in range(turn[0].start, min(turn[-1].end, turn[0].start + _ANSWER_REACH)):
        word = items[i].word
        if word in _NO or word.endswith("n't"):
            return DENIED
        following = items[i + 1].word if i + 1 < len(items) else ""
        own = word in _OWN_VERBS and i and items[i - 1].word in ("i", "it", "he", "she")
        ends = i + 1 == len(items) or items[i + 1].gap != "" or following in _BEHIND_ANSWER
        if word in _YES and following in ("not", "n't"):
            return DENIED
        if word in _YES or (own and ends and following != "not"):
            return AFFIRMED
        seen += word not in _FILLERS
        if seen > 4:
            break
    return ASKED
