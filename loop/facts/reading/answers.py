"""The polarity of what a question asks: that of the answer."""

import bisect
import itertools

from ..numerals import Item
from .clauses import BEHIND_ANSWER, NO_WORDS, SUBJECT_WORDS, Clause
from .polarity import AFFIRMED, ASKED, DENIED, ENDED
from .subjects import SELF_OR_YOU

_YES = frozenset(
    """yes yeah yep yup correct definitely absolutely exactly sometimes occasionally uh-huh mm-hmm
    little unfortunately true certainly some mhm mm lot ya yah often usually always""".split()
)
_YES_PHRASES = [
    phrase.split()
    for phrase in (
        "all the time;here and there;now and then;now and again;once in a while;you bet;"
        "off and on;on and off;from time to time;every now;every day;every night;of course;"
        "wish i could say no;wish i didn't;can't say no;only when;only if;only on;only at"
    ).split(";")
]
_NAY = frozenset("nah naw uh-uh nuh-uh".split())
_ANSWERS = frozenset("no nope yes yeah yep yup none never".split())
_FILLERS = frozenset(
    """um uh well oh okay ok so i you know mean doctor ah hmm alright and like actually right sir a
    ma'am just it's think that it really""".split()
)
_THE_KNOWN = frozenset("your his her their the that those this".split())
_ASKED_OF = SUBJECT_WORDS | {"this", "that", "these", "the", "your", "his", "her"}
_HOW_MUCH = frozenset("little some lot usually always often".split())  # "it itches a little"
_HAVE = frozenset("have had get got feel do did 've has i've been be is was".split())
_OWN_VERBS = frozenset("do did have has does am".split())
_MEANT, _THAT = (
    frozenset("mean means huh pardon".split()),
    frozenset("that that's those like".split()),
)
_ONCE = ("former", "formerly", "ex", "quit", "previously")
_RATED = ("rate", "scale")
_MEASURED = frozenset("much many often long".split())
_SOME_OF = frozenset("a couple few half pack weekends weekly daily".split())
# Before "the pain", they say that it is there.
_DONE_FOR = frozenset(
    """for from help helps helped helping relieve relieves relieved ease eases caused triggers
    trigger triggered worsen worsens during after before since""".split()
)
_KNOWN_REACH = 3
_ANSWER_REACH = 14  # items of an answer that are read
_SHORT_TURN = 8  # items of a question without a question mark, at most


def answer_questions(items: list[Item], clauses: list[Clause], polarities: list[str]) -> None:
    """Gives what a turn asks for the polarity of the answer in the next turn."""
    turns: list[list[Clause]] = []
    for clause in clauses:
        if clause.new_turn:
            turns.append([])
        turns[-1].append(clause)
    for number, turn in enumerate(turns):
        following = turns[number + 1] if number + 1 < len(turns) else []
        answer = _answer(items, following)
        if answer == ASKED and _asks_back(items, following):
            answer = _answer(items, turns[number + 3] if number + 3 < len(turns) else [])
        asked = [clause for clause in turn if clause.asks]
        short = turn[-1].end - turn[0].start <= _SHORT_TURN
        first_person = {item.word for item in items[turn[0].start : turn[-1].end]} & SELF_OR_YOU
        short = short and not first_person & {"i", "my", "i'm", "i've"}
        before = turns[number - 1][-1] if number else None
        replies = before is not None and before.asks and _counts(items, turn)  # "two a day"
        if not asked and short and not replies:
            if answer != ASKED and _answer(items, turn) == ASKED:
                asked = turn  # "nausea vomiting", without a question mark
        for clause in asked:
            behind = bisect.bisect_left(turn, clause.end, key=lambda c: c.start)
            own = _answer(items, turn[behind : behind + _ANSWER_REACH])
            first = items[clause.end].word if own != ASKED else ""
            given = own if first in _ANSWERS else answer
            if given == DENIED and _presupposes(items, clause):
                given = ENDED
            if given == DENIED and _ended(items, clause, following):
                given = ENDED
            if given == ASKED and following and items[following[0].start].word in _ONCE:
                given = ENDED  # "smoker? - Former."
            if given == ASKED and _asks_how_much(items, turn, clause) and _counts(items, following):
                given = AFFIRMED
            stays = _says_no(items, clause) and not _insists(items, following)
            for i in range(clause.start, clause.end):
                if given == DENIED and _is_given(items, i, clause):
                    continue  # "anything for the pain? - No"
                is_denied = polarities[i] == DENIED and not stays
                if polarities[i] == AFFIRMED or (given == AFFIRMED and is_denied):
                    polarities[i] = given


def _reads(items: list[Item], i: int, phrase: list[str]) -> bool:
    """Whether the words from item i on are these."""
    return [item.word for item in items[i : i + len(phrase)]] == phrase


def _asks_back(items: list[Item], turn: list[Clause]) -> bool:
    """Whether a turn asks what was meant: "psoriasis? what is that?"; the answer comes later."""
    length = turn[-1].end - turn[0].start if turn and turn[-1].asks else 0
    if length <= 2 or length > _SHORT_TURN:
        return 0 < length <= 2  # "drugs?"
    words = {item.word for item in items[turn[0].start : turn[-1].end]}
    return bool(words & _MEANT) or (bool(words & {"what", "what's"}) and bool(words & _THAT))


def _says_no(items: list[Item], clause: Clause) -> bool:
    """Whether a question denies: "no fever, right?"; a "yes" or a "no" agrees with it."""
    for i in range(clause.start, clause.end - 1):
        word, following = items[i].word, items[i + 1].word
        if word in ("no", "without"):
            return True
        if (word == "not" or word.endswith("n't")) and following not in _ASKED_OF:
            return True  # "you don't smoke?", but not "don't you smoke?"
    return False


def _presupposes(items: list[Item], clause: Clause) -> bool:
    """Whether a question takes for granted what it asks of: "how is your back pain?"."""
    words = [item.word for item in items[clause.start : clause.end]]
    for k, word in enumerate(words[:4]):
        behind = k + 1 + (word == "how")
        asks = word == "how's" or (word == "how" and words[k + 1 : k + 2] != ["about"])
        if asks and words[behind : behind + 1] and words[behind] in _THE_KNOWN:
            return True
    return False


def _ended(items: list[Item], clause: Clause, answer: list[Clause]) -> bool:
    """Whether a "no" says that it was so once: "still smoking? - No", "not for two years"."""
    if any(item.word == "still" for item in items[clause.start : clause.end]):
        return True
    if not answer or items[answer[0].start].word not in ("not", "no"):
        return False
    first = [item.word for item in items[answer[0].start : answer[0].start + 3]]
    behind = first[2:] if first[1:2] == ["not"] else first[1:]
    return behind[:1] in (["for"], ["since"], ["anymore"]) or behind[:2] == ["any", "more"]


def _asks_how_much(items: list[Item], turn: list[Clause], clause: Clause) -> bool:
    """Whether a question takes for granted that there is some: "how much do you smoke?".

    So does one for a figure on a scale: "how would you rate the pain?".
    """
    if any(item.word in _RATED for item in items[clause.start : clause.end]):
        return True
    start = max(turn[0].start, clause.start - 3)
    first = [item.word for item in items[start : min(clause.end, clause.start + 4)]]
    return any(pair[0] == "how" and pair[1] in _MEASURED for pair in itertools.pairwise(first))


def _counts(items: list[Item], turn: list[Clause]) -> bool:
    """Whether a turn answers "how much?" by an amount: "a pack a day", "about ten"."""
    if not turn:
        return False
    end = min(turn[-1].end, turn[0].start + _ANSWER_REACH)
    return any(
        items[i].number is not None or items[i].word in _SOME_OF for i in range(turn[0].start, end)
    )


def _insists(items: list[Item], turn: list[Clause]) -> bool:
    """Whether a turn says "yes, I do" to a question that denies."""
    start, end = (turn[0].start, turn[-1].end) if turn else (0, 0)
    words = [item.word for item in items[start : min(end, start + _ANSWER_REACH)]]
    return any(
        pair == ("i", verb) and words[k + 2 : k + 3] != ["not"]
        for k, pair in enumerate(itertools.pairwise(words))
        for verb in ("do", "have", "did")
        if words[0] in _YES
    )


def _is_given(items: list[Item], i: int, clause: Clause) -> bool:
    """Whether a question asks of something else, and item i is there: "anything for the pain?"."""
    for k in range(max(clause.start + 1, i - _KNOWN_REACH), i):
        if items[k].word in _THE_KNOWN and items[k - 1].word in _DONE_FOR:
            return True
    return False


def _answer(items: list[Item], turn: list[Clause]) -> str:
    """What a turn answers: affirmed, denied, or asked where that stays open."""
    if not turn:
        return ASKED
    seen = 0
    for i in range(turn[0].start, min(turn[-1].end, turn[0].start + _ANSWER_REACH)):
        word = items[i].word
        if any(_reads(items, i, phrase) for phrase in _YES_PHRASES):
            return AFFIRMED
        if word in NO_WORDS or word in _NAY or word.endswith("n't"):
            return DENIED
        following = items[i + 1].word if i + 1 < len(items) else ""
        own = word in _OWN_VERBS and i and items[i - 1].word in ("i", "it", "he", "she")
        ends = i + 1 == len(items) or items[i + 1].gap != "" or following in BEHIND_ANSWER
        if word in _YES and following in ("not", "n't") and items[i + 1].gap == "":
            return DENIED
        agrees = word in _YES and (word not in _HOW_MUCH or not seen or items[i - 2].word in _HAVE)
        if agrees or (own and ends and following != "not"):
            return AFFIRMED
        seen += word not in _FILLERS
        if seen > 4:
            break
    return ASKED
