"""Cuts a text into clauses, also where speech was written down without punctuation."""

from typing import NamedTuple

from ..numerals import Item, count_speakers

NO_WORDS = frozenset(
    """no denies denied deny denying without not never neither nor negative absent absence cannot
    n't nt free lacks nope doubt ruled none nothing nobody wish""".split()
)
POSSIBLE_WORDS = frozenset(
    """possible possibly probable probably likely suspect suspected suspicion may might maybe
    could perhaps if concern concerning concerned rule consider considering questionable versus vs
    whether worried risk risks prevent should watch unlikely unless in-case avoid
    suspicious""".split()
)
SUBJECT_WORDS = frozenset(
    """i you he she we they it there i'm i've i'd you're you've he's she's it's there's we're
    they're we'll i'll you'll it'll that's""".split()
)
FOUND_WORDS = frozenset(
    """identified seen present noted appreciated found evident detected visualized reported
    palpable observed demonstrated""".split()
)
BEHIND_ANSWER = frozenset(("no", "yeah", "yes", "nothing", "not", "okay", "i", "just", "it"))
# Words that begin another clause.
_BREAKS = frozenset(
    """but however although though because except yet which apart aside whereas
    nevertheless""".split()
)
_WRITTEN_BREAKS = frozenset(
    """reports reported endorses endorsed states stated complains admits admitted presents notes
    explains positive remarkable significant believes continues describes confirms
    acknowledges mentions exception presented""".split()
)
_NO_BREAK_BEHIND = frozenset("no not any without was were been be is".split())  # "was admitted"
# Behind a comma, they begin another clause of a note.
_AFTER_COMMA = frozenset("he she they the his her it smokes drinks uses lives works takes".split())
_SPOKEN_BREAKS = frozenset("so okay ok alright well now then and-then anyway".split())
# Behind these a subject belongs to the same clause.
_LINKS = frozenset(
    """if when whether that think thought believe say says said know where how why who as than
    while after before until unless since like what see sure wish""".split()
)
_AUXILIARIES = frozenset(
    """do does did have has had are is was were can could would will should am have-n't
    don't doesn't didn't haven't hasn't aren't isn't wasn't""".split()
)
_DO, _SHOWN_THINGS = ("does", "did"), ("that", "this")  # "does this hurt"
_COPULAS = frozenset("is are was were looks look sounds sound feels".split())
# What a noun's clause goes on from.
_BEFORE_NOUN = frozenset(
    """the a an my your his her their our this that these those any some no all and or of in on with
    which who what there here how where when it he she we they you everything""".split()
)
_ASKERS = SUBJECT_WORDS.union(("anyone", "anybody", "anything", "your", "the", "that", "this"))
# One word in so many of what is spoken is one of these, ends a question or names who speaks.
_SPEECH_WORDS = frozenset(
    """i i'm i've you you're your my me yeah yes okay ok um uh hi hello thank thanks mm
    hmm""".split()
)
_SPEECH_SHARE = 20
_SENTENCE = frozenset(".!?\n\u2022;")


def is_speech(text: str, items: list[Item]) -> bool:
    """Whether a text is a dialogue rather than a note, by its speakers or by how it speaks.

    A text is always read as the same kind, whichever text it is compared with: so it supports
    itself.
    """
    speaking = sum((item.word in _SPEECH_WORDS) + (item.gap == "?") for item in items)
    speaking += text.rstrip().endswith("?")
    return (speaking + count_speakers(text)) * _SPEECH_SHARE > len(items)


class Clause(NamedTuple):
    start: int
    end: int
    sentence: int
    new_turn: bool
    asks: bool


def read_clauses(text: str, items: list[Item], spoken: bool) -> list[Clause]:
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
        clauses.append(Clause(start, end, sentence, start == 0 or items[start].gap == "\n", asks))
    return clauses


def _begins_clause(items: list[Item], i: int, spoken: bool) -> bool:
    word, previous = items[i].word, items[i - 1].word
    if word == "however" and items[i].gap == "," and i + 1 < len(items):
        return items[i + 1].gap != ","  # "denies, however, any cough"
    if word in _BREAKS:
        return not (word == "but" and i + 2 < len(items) and items[i + 2].word == "limited")
    if not spoken:
        if word in ("denies", "denied"):
            return i + 1 < len(items) and items[i + 1].gap not in _SENTENCE  # "alcohol, denies."
        if word in _WRITTEN_BREAKS:
            return previous not in _NO_BREAK_BEHIND
        if previous == "and" and word in ("he", "she", "they", "there"):
            return True
        if previous == "and" and word in ("his", "her"):  # "not on it and her rate is up"
            return any(item.word in _COPULAS for item in items[i + 1 : i + 4])
        return items[i].gap == "," and word in _AFTER_COMMA
    if word in _SPOKEN_BREAKS:
        return True
    if word in ("no", "yes", "yeah", "nope") and _answers_itself(items, i):
        return True
    following = items[i + 1].word if i + 1 < len(items) else ""
    asks = following in SUBJECT_WORDS or (word in _DO and following in _SHOWN_THINGS)
    if word in _AUXILIARIES and asks and previous not in _LINKS:
        return previous not in SUBJECT_WORDS
    if previous in _LINKS:
        return False
    if following in _COPULAS and i + 2 < len(items) and items[i + 2].word in FOUND_WORDS:
        return not any(item.word in NO_WORDS for item in items[max(0, i - 4) : i])
    together = i + 1 < len(items) and items[i + 1].gap == ""
    if following in _COPULAS and together and word not in SUBJECT_WORDS:
        goes_on = previous in _BEFORE_NOUN or previous in NO_WORDS or word in _BEFORE_NOUN
        return not goes_on  # "no drift sensation is intact"
    if word == "your":
        return any(item.word in _COPULAS or item.word == "exam" for item in items[i + 1 : i + 4])
    if word not in SUBJECT_WORDS:
        return False
    return previous not in _AUXILIARIES and previous not in ("n't", "not", "or")


def _answers_itself(items: list[Item], i: int) -> bool:
    """Whether the word at item i answers a question before it: "any chest pain no no"."""
    following = items[i + 1] if i + 1 < len(items) else None
    return following is None or following.gap != "" or following.word in BEHIND_ANSWER


def _asks(text: str, items: list[Item], start: int, end: int) -> bool:
    """Whether a clause is a question."""
    behind = items[end].start if end < len(items) else len(text)
    if "?" in text[items[end - 1].end : behind]:
        return True
    words = [item.word for item in items[start:end]]
    for k, word in enumerate(words[:4]):
        following = words[k + 1] if k + 1 < len(words) else ""
        if word in _AUXILIARIES and following in _ASKERS:
            return k == 0 or words[k - 1] not in SUBJECT_WORDS | _AUXILIARIES
        if (word, following) in (("how", "about"), ("what", "about"), ("how", "is")):
            return True
        if word in ("any", "anything") and not NO_WORDS & set(words[:k]):
            return "if" not in words[:k]
    if "any" in words:
        before = words[: words.index("any")]
        return not any(w in NO_WORDS or w in POSSIBLE_WORDS or w.endswith("n't") for w in before)
    return False
