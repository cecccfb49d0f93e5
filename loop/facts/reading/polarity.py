"""Whether what a word names is affirmed, denied or possible, by the words before and behind it."""

from ..numerals import Item
from .clauses import FOUND_WORDS, NO_WORDS, POSSIBLE_WORDS, SUBJECT_WORDS, Clause

AFFIRMED, DENIED, POSSIBLE, ASKED = "affirmed", "denied", "possible", "asked"
FORMER = "former"  # "history of", "quit"
CURRENT = "current"  # of a habit that a note says goes on
QUIET = "quiet"  # of what a note says is there, but no other and no trouble
ENDED = "ended"  # "resolved", and in speech what is denied with "still" or "no more"
NORMAL = "normal"  # of what may be normal or not, such as "blood pressure"
# They end a negation: "no cough due to asthma", "no medicine for her asthma".
_RESETS = frozenset(
    """due secondary despite since until during after before when while following upon because
    prompting""".split()
)
_TESTS = frozenset("test tests result screen swab hiv covid strep flu mono".split())
_THOUGHTS = frozenset(
    "think believe feel suppose recall remember know notice noticed see doubt".split()
)
_BEHIND_NO = frozenset(
    """change changes only doubt problem problems matter further sure worries idea just
    necessarily""".split()
)
DENIES = ("denies", "denied", "deny", "wish")  # with "some" behind, too
_SEEKING = frozenset(
    """needed prn look looks looking looked check checks checking checked test testing screen
    screening screened evaluate evaluating""".split()
)
_RESULTS = frozenset("margin margins node nodes".split())  # that are negative: nothing is denied
_RELIEF = ("relief", "improvement")
_DOUBTERS = frozenset("i we would highly really seriously".split())
_PASSIVE = frozenset("was were is are been be being got".split())
_BEHIND_PASSIVE = frozenset("by with on after for in as at".split())
_THESE = frozenset("her his my this your the".split())
# "It did not relieve the pain" and "risks are not limited to pain" deny no pain.
_LEFT_AS_IT_IS = frozenset(
    """relieve relieved relieving help helped helping improve improved improving improvement
    alleviate alleviated resolve resolved control controlled limited relief touch ease eased know
    knows sure certain tolerate tolerated tolerating manage managed worked work clear
    explain always every only just stop treated treating need needs""".split()
)
_SOME = frozenset("some slight slightly mild mildly minimal positive just only occasional".split())
_MAX_SPOKEN_REACH, _MAX_WRITTEN_REACH = 16, 60
_POSSIBLE_REACH = 12
_LIST_REACH = 6


def read_polarity(
    items: list[Item], clause: Clause, spoken: bool, carried: str, polarities: list[str]
) -> str:
    """Sets the polarity of the clause's items; returns what the next clause begins with."""
    polarity = carried if not clause.new_turn else AFFIRMED
    reach = clause.start + (6 if carried != AFFIRMED else 0)
    limit = _MAX_SPOKEN_REACH if spoken else _MAX_WRITTEN_REACH
    start, trigger = clause.start, ""
    for i in range(clause.start, clause.end):
        word = items[i].word
        if i >= reach or (polarity == DENIED and _ends_negation(items, i, trigger)):
            polarity = AFFIRMED
        if polarity == POSSIBLE and items[i].gap == ":" and not spoken:
            polarity = AFFIRMED  # "RISK FACTORS: hypertension"
        if "non" in (items[i - 1].word if i else "", _two_before_habit(items, i)):  # "non-tender"
            polarities[i] = DENIED
            continue
        if word == "free" and i > clause.start and items[i].gap == "":  # "pain free"
            polarities[i - 1] = DENIED
        cannot = trigger.endswith("n't") or trigger in ("not", "cannot")
        if polarity == DENIED and _denies_again(items, i, cannot):
            polarity, reach = AFFIRMED, clause.start
        elif word in NO_WORDS or word.endswith("n't"):
            if _is_behind(items, i, clause):
                for k in range(start, i):
                    polarities[k] = DENIED
            elif not _negates_nothing(items, i, clause, spoken):
                polarity, reach, trigger = DENIED, min(clause.end, i + limit), word
                if i + 1 < clause.end and items[i + 1].word == "longer":
                    polarity = ENDED
        elif _may_be(items, i, clause) and polarity != DENIED:
            polarity, reach = POSSIBLE, min(clause.end, i + _POSSIBLE_REACH)
        if items[i].gap == "," and (spoken or word != "and"):
            start = i
        if polarity != AFFIRMED and (items[i].gap == "," or word in ("or", "any")):
            reach = min(clause.end, max(reach, i + _LIST_REACH))  # a list goes on
        polarities[i] = polarity
    last = [item.word for item in items[max(clause.start, clause.end - 3) : clause.end]]
    if spoken and polarity != AFFIRMED and (_THOUGHTS & set(last) or last[-1:] == ["if"]):
        return polarity
    return AFFIRMED


def _may_be(items: list[Item], i: int, clause: Clause) -> bool:
    """Whether what follows item i is possible alone; "do you know if you have" asks."""
    if items[i].word in ("if", "whether") and clause.asks:
        return items[i - 1].word not in _THOUGHTS
    return items[i].word in POSSIBLE_WORDS or _is_sought(items, i)


def _denies_again(items: list[Item], i: int, cannot: bool) -> bool:
    """Whether item i denies what is denied: "can't walk without pain", "denies no fever"."""
    word = items[i].word
    return (word == "without" and cannot) or (word == "no" and items[i - 1].word in DENIES)


def _two_before_habit(items: list[Item], i: int) -> str:
    """The word two before that at item i, where that is a habit: "non-cigarette smoker"."""
    return items[i - 2].word if i > 1 and items[i].word in ("smoker", "user", "drinker") else ""


def _is_sought(items: list[Item], i: int) -> bool:
    """Whether what follows is looked for, or what something is taken for: "as needed for pain"."""
    return items[i].word in _SEEKING and i + 1 < len(items) and items[i + 1].word == "for"


def _ends_negation(items: list[Item], i: int, trigger: str) -> bool:
    """Whether what a word such as "no" or "denies" denies ends before item i."""
    word, following = items[i].word, items[i + 1].word if i + 1 < len(items) else ""
    if word in _SOME:
        return items[i - 1].word not in NO_WORDS and trigger not in DENIES
    if [item.word for item in items[i : i + 3]] in (["at", "the", "time"], ["at", "that", "time"]):
        return True
    if word == "as" and following in ("the", "he", "she", "patient"):
        return True
    return word in _RESETS or (word == "for" and following in _THESE)


def _is_behind(items: list[Item], i: int, clause: Clause) -> bool:
    """Whether the negation at item i denies what stands before it: "rebound is absent"."""
    word = items[i].word
    following = items[i + 1].word if i + 1 < clause.end else ""
    if word == "not":
        later = items[i + 2].word if i + 2 < clause.end else ""
        if following in ("a", "an"):
            return later in ("issue", "problem", "concern")
        return following in FOUND_WORDS and later not in ("prior", "before", "until")
    if word == "ruled":
        passive = items[i - 1].word in _PASSIVE or i + 2 >= clause.end
        return following == "out" and (passive or items[i + 2].word in _BEHIND_PASSIVE)
    if word in ("negative", "absent") and items[i - 1].word in ("is", "are", "was", "were"):
        return following != "for" and not _is_of_result(items, i)
    if word in ("negative", "absent", "none", "denies", "denied", "never"):
        return not following or following in ("bilaterally", "today", "in", "on", "and", "at")
    return False


def _is_of_result(items: list[Item], i: int) -> bool:
    """Whether the "negative" at item i is said of margins or lymph nodes: it denies no illness."""
    return any(item.word in _RESULTS for item in items[max(0, i - 2) : i])


def _negates_nothing(items: list[Item], i: int, clause: Clause, spoken: bool) -> bool:
    """Whether the word at item i is an answer, or belongs to "no longer" and the like."""
    word = items[i].word
    following = items[i + 1] if i + 1 < clause.end else None
    if word == "doubt" and items[i - 1].word not in _DOUBTERS:
        return True  # "no doubt", "in doubt"
    if following is None:
        return word not in ("n't", "doubt")
    if following.word == "more":
        return i + 2 < clause.end and items[i + 2].word == "than"
    if (word, following.word) == ("no", "clear"):
        return False  # "no clear evidence"
    if (word, following.word) == ("never", "touch"):
        return False
    if any(item.word in _RELIEF for item in items[i + 1 : min(clause.end, i + 4)]):
        return True  # "no long-term relief of"
    if following.word in _BEHIND_NO or following.word in _LEFT_AS_IT_IS:
        return True
    if following.word.endswith("ly") or following.word in ("significant", "much", "really"):
        return i + 2 < clause.end and items[i + 2].word in _LEFT_AS_IT_IS
    if word == "free":
        return following.word not in ("of", "from")
    if word == "negative" and (following.word in _RESULTS or _is_of_result(items, i)):
        return True
    if word == "negative" and spoken:
        tested = {item.word for item in items[i + 1 : i + 4]} & _TESTS
        return following.word not in ("for", "any") and not tested
    if word == "no" and spoken:  # an answer: "no , i have pain"
        return following.gap == "," or following.word in SUBJECT_WORDS | {"no", "not"}
    if word == "ruled":
        return following.word != "out"
    return word in ("none", "nope")
