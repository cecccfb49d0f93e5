"""Who a word is about, and whether it is affirmed: rules after ConText (Harkema et al. 2009).

A trigger ("denies", "no", "my mother") holds for the words behind it up to the end of the sentence
or a word that begins another thought. A doctor's question takes its polarity from the answer.
"""

from typing import NamedTuple

from .numerals import Item

AFFIRMED, DENIED, POSSIBLE, ASKED = "affirmed", "denied", "possible", "asked"
_NO = frozenset(
    """no denies denied deny denying without not never neither nor none negative absent
    absence cannot isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't won't
    can't n't nt free ain't couldn't wouldn't lacks unremarkable nope ruled""".split()
)
_POSSIBLE = frozenset(
    """possible possibly probable probably likely suspect suspected suspicion may
    might maybe could perhaps if concern concerning concerned rule consider questionable versus
    vs whether worried risk prevent should watch unlikely history-taking""".split()
)
_FAMILY = frozenset(
    """mother father mom dad mum brother sister aunt uncle grandmother grandfather
    grandma grandpa cousin parent sibling family familial son daughter maternal paternal husband
    wife brothers sisters mother's father's mom's dad's grandparent grandparents
    parents siblings""".split()
)
_SELF = frozenset("i i'm i've me my patient she he you you're you've mr mrs ms myself".split())
_HISTORY = frozenset("history previously prior past ago former formerly quit childhood hx".split())
_STOPS = frozenset(
    """but however except although though because reports reported endorses states
    complains admits presents which yet apart positive otherwise""".split()
)
_SPOKEN_STOPS = _STOPS | frozenset("i i'm i've okay so well alright".split())
_BEHIND_NO = frozenset(
    "change changes longer only doubt problem problems matter further sure".split()
)
_YES = frozenset(
    """yes yeah yep yup sure correct right definitely absolutely exactly sometimes
    occasionally uh-huh mm-hmm little unfortunately true certainly some mhm mm""".split()
)
_FILLERS = frozenset("um uh well oh okay so i you know mean doctor ah hmm alright and like".split())
_ASKS = frozenset(
    """any do does did have has are is was were how what when where who why can could
    anything ever which""".split()
)
_SENTENCE = frozenset(".!?\n\u2022;")


class Context(NamedTuple):
    """The polarity, subject and time of each item of a text."""

    polarity: list[str]
    subject: list[str]  # patient or family
    time: list[str]  # now or history
    sentence: list[int]


def read_context(text: str, items: list[Item], spoken: bool) -> Context:
    """The context of each item. spoken: the text is a dialogue, with questions and answers."""
    count = len(items)
    context = Context([AFFIRMED] * count, ["patient"] * count, ["now"] * count, [0] * count)
    starts = [i for i, item in enumerate(items) if i == 0 or item.gap in _SENTENCE] + [count]
    family_section = False
    for number, (start, end) in enumerate(zip(starts, starts[1:])):
        words = [item.word for item in items[start : min(end, start + 6)]]
        if not spoken:
            family_section = _in_family_section(text, items, start, end, words, family_section)
        _read_sentence(items, start, end, spoken, context)
        if family_section:
            context.subject[start:end] = ["family"] * (end - start)
        context.sentence[start:end] = [number] * (end - start)
    if spoken:
        _answer_questions(items, starts, context)
    return context


def _in_family_section(
    text: str, items: list[Item], start: int, end: int, words: list[str], before: bool
) -> bool:
    """Whether a sentence of a note stands under "Family history"."""
    if items[start].gap != "\n" and start:
        return before
    if words[:2] == ["family", "history"] or words[:3] == ["family", "medical", "history"]:
        return True
    is_header = ":" in text[items[start].start : items[end - 1].end + 1]
    return before and not is_header and "history" not in words


def _read_sentence(items: list[Item], start: int, end: int, spoken: bool, context: Context) -> None:
    stops = _SPOKEN_STOPS if spoken else _STOPS
    polarity, subject, time = AFFIRMED, "patient", "now"
    reach = end
    for i in range(start, end):
        item = items[i]
        word = item.word
        if word in stops and not (i > start and items[i - 1].word in ("no", "any", "not")):
            polarity = AFFIRMED
        if i >= reach:
            polarity = AFFIRMED
        if word in _NO or word.endswith("n't"):
            polarity, reach = _negation(items, start, i, end, spoken, polarity, reach, context)
        elif word in _POSSIBLE and polarity != DENIED:
            polarity, reach = POSSIBLE, min(end, i + 12)
        if word in _FAMILY:
            subject = "family"
        elif word in _SELF and subject == "family" and word not in ("my", "he", "she", "you"):
            subject = "patient"
        if word in _HISTORY:
            time = "history"
        context.polarity[i], context.subject[i], context.time[i] = polarity, subject, time


def _negation(items, start, i, end, spoken, polarity, reach, context) -> tuple[str, int]:
    """(the polarity behind the negation at item i, where it ends)"""
    word = items[i].word
    following = items[i + 1] if i + 1 < end else None
    if following and following.word in _BEHIND_NO:
        return polarity, reach
    if word == "no" and spoken and following and following.gap == ",":
        return polarity, reach  # an answer: "no , i have pain"
    if word == "ruled" or (word in ("negative", "absent", "none") and not following):
        context.polarity[start:i] = [DENIED] * (i - start)
        return DENIED, end
    if word == "unremarkable" or (word == "free" and (not following or following.word != "of")):
        return polarity, reach
    return DENIED, min(end, i + (14 if spoken else 40))


def _answer_questions(items: list[Item], starts: list[int], context: Context) -> None:
    """Gives what a question asks for the polarity of its answer."""
    waiting: list[tuple[int, int]] = []
    last_family = False
    for start, end in zip(starts, starts[1:]):
        new_turn = items[start].gap == "\n"
        if waiting and (new_turn or _answer(items, start, end) != ASKED):
            answer = _answer(items, start, end)
            for first, last in waiting[-3:]:
                for i in range(first, last):
                    if context.polarity[i] == AFFIRMED or (
                        context.polarity[i] == ASKED or answer == AFFIRMED
                    ):
                        context.polarity[i] = answer
            waiting = []
            if last_family and not any(item.word in _SELF for item in items[start : start + 3]):
                context.subject[start:end] = ["family"] * (end - start)
        asks = end < len(items) and items[end].gap == "?" or items[start].word in _ASKS
        asks = asks or any(item.word == "any" for item in items[start:end])
        if asks:
            waiting.append((start, end))
            last_family = any(item.word in _FAMILY for item in items[start:end])
    for first, last in waiting:
        context.polarity[first:last] = [ASKED] * (last - first)


def _answer(items: list[Item], start: int, end: int) -> str:
    """What the sentence answers: affirmed, denied, or asked where that stays open."""
    seen = 0
    for item in items[start : min(end, start + 12)]:
        word = item.word
        if word in _NO or word.endswith("n't"):
            return DENIED
        if word in _YES:
            return AFFIRMED
        seen += word not in _FILLERS
        if seen > 5:
            break
    return ASKED
