"""The sides of a text, each with its part of the body; "all right" and "I left" are none."""

from typing import NamedTuple

from ..body import PARTS
from .parsed import Parsed
from .vocabulary import SIDES

# "right" before these is no side: "right at the shoulder".
_AFTER_EXACTLY = frozenset(
    "at in on over around above below under behind next by where when".split()
)
_NOT_A_SIDE = frozenset("now away there here through before after handed-over alone".split())
_SAYS = frozenset("all that's you're okay i is she he was have has".split())
_OWN = frozenset("the my your his her".split())
_SPOKEN_REACH, _WRITTEN_REACH = 7, 5  # items in which the part follows
_ANSWER_REACH = 6  # items of a turn in which "which side?" is answered
_QUESTION_REACH = 20

_HANDED = frozenset("handed dominant hander".split())
_MORE = frozenset("worse greater more bigger larger weaker stronger stiffer less better".split())
_COMPARED_REACH, _THAN_REACH = 8, 5


# "OS" is an eye where its clause speaks of eyes, and "AD" an ear; elsewhere they mean other things.
_LATIN_SIDES = {"od": ("right", "eye"), "os": ("left", "eye"), "ou": ("both", "eye")}
_LATIN_SIDES |= {"au": ("both", "ear"), "ad": ("right", "ear")}
_OF_LATIN_SIDES = {
    "eye": frozenset(
        """eye eyes drop drops gtt gtts vision visual acuity cataract cataracts glaucoma ointment
        ophthalmic cornea retina pupil iop lens timolol latanoprost""".split()
    ),
    "ear": frozenset("ear ears drop drops gtt gtts otic canal tympanic tm cerumen".split()),
}
_LATIN_REACH = 12


class Side(NamedTuple):
    """A side that begins at some item."""

    side: str  # left, right or both
    part: str  # "" where none follows; "handedness" of "right-handed"
    num_items: int


def side_at(parsed: Parsed, i: int) -> Side | None:
    """The side at item i, which must be one of SIDES; None where the word means something else."""
    word, items = parsed.items[i].word, parsed.padded
    before, after = items[i - 1].word if i else "", items[i + 1].word
    if _is_exactly(parsed, i) or (parsed.spoken and _is_choice(parsed, i)):
        return None
    if len(word) == 1 and (parsed.spoken or before in ("", "'") or _is_of_letters(parsed, i)):
        return None
    if after == "handed" or (after, items[i + 2].word) == ("hand", "dominant"):
        return Side(SIDES[word], "handedness", 2)
    part, count = _part_behind(parsed, i)
    if part:
        return Side(SIDES[word], part, count)
    answers = _answers_which(parsed, i)
    if answers and _HANDED & {item.word for item in items[max(0, i - _QUESTION_REACH) : i]}:
        return Side(SIDES[word], "handedness", 1)  # "right or left handed? - Right."
    if word.startswith("bi") or answers or parsed.stems[i + 1] in ("side", "sided"):
        return Side(SIDES[word], "", 1)
    if word == "both" and (after in _OWN or (after, items[i + 2].word) == ("the", "sides")):
        return Side("both", "", 1)
    if before in _SAYS or after in _NOT_A_SIDE:
        return None
    return Side(SIDES[word], "", 1) if before in _OWN or before in ("on", "to") else None


def latin_side_at(parsed: Parsed, i: int) -> Side | None:
    """The side of an eye or ear at item i, such as "OS"; None where the letters mean none."""
    side, part = _LATIN_SIDES.get(parsed.items[i].word, ("", ""))
    if not side or not parsed.near(i, _OF_LATIN_SIDES[part], _LATIN_REACH):
        return None
    return Side(side, part, 1)


def compared_at(parsed: Parsed, i: int) -> str:
    """ "left more than right" of "left worse than right" at item i; "" for no comparison."""
    items, first = parsed.padded, SIDES[parsed.items[i].word]
    for k in range(i + 1, min(i + _COMPARED_REACH, len(parsed.items))):
        if items[k].gap in (".", "\n", ";", "?") or items[k].word in SIDES:
            break
        if items[k].word in _MORE and items[k + 1].word == "than":
            behind = [items[m].word for m in range(k + 2, k + 2 + _THAN_REACH)]
            other = next((SIDES[word] for word in behind if word in SIDES), "")
            if "both" in (first, other) or not other:
                break
            less = items[k].word in ("less", "better")
            return f"{other} more than {first}" if less else f"{first} more than {other}"
    return ""


def _is_exactly(parsed: Parsed, i: int) -> bool:
    """Whether the word at item i is "right" as in "right at the shoulder", "right here"."""
    if parsed.items[i].word != "right":
        return False
    before, after = parsed.items[i - 1].word if i else "", parsed.padded[i + 1].word
    if parsed.spoken and after in ("there", "here", "now", "away"):
        return True
    return after in _AFTER_EXACTLY and (parsed.spoken or before not in (*_OWN, "on", "to"))


def _is_of_letters(parsed: Parsed, i: int) -> bool:
    """Whether the letter at item i belongs to others, as in "L-S spine" and "L.S."."""
    following = parsed.padded[i + 1]
    return len(following.word) == 1 and following.word.isalpha()


def _part_behind(parsed: Parsed, i: int) -> tuple[str, int]:
    """(the part that the side at item i is of, the items up to its end); ("", 1) for none."""
    items, before = parsed.padded, parsed.items[i - 1].word if i else ""
    reach = _SPOKEN_REACH if parsed.spoken else _WRITTEN_REACH
    for k in range(i + 1, min(i + reach, len(parsed.items))):
        apart = items[k].gap not in ("", ",", "(", ")")
        ends = items[k].gap == "," and parsed.items[i].word == "bilaterally"
        joined = items[k].word == "and" and k == i + 1 and before == "the"  # "on the right and"
        if apart or ends or joined or (items[k].word in SIDES and k > i + 1):
            break
        if parsed.stems[k] == "hand" and parsed.stems[k + 1] == "side":
            return "", 1
        found = PARTS.at(items, parsed.stems, k)
        if found:
            return found.meaning, k + found.num_items - i
    return "", 1


def _is_choice(parsed: Parsed, i: int) -> bool:
    """Whether the side at item i is one of "left or right", as a question asks."""
    turn = parsed.context.turn
    near = [k for k in range(max(0, i - 4), min(i + 5, len(turn))) if turn[k] == turn[i]]
    around = [parsed.items[k].word for k in near]
    at = near.index(i)
    return any(
        around[k] == "or" and around[k + 1 :] and SIDES.keys() & set(around[other])
        for k in range(len(around))
        for other in (slice(0, at) if k < at else slice(at + 1, None),)
    )


def _answers_which(parsed: Parsed, i: int) -> bool:
    """Whether the side at item i answers "which knee?" or "left or right?"."""
    items, turn = parsed.items, parsed.context.turn
    start = i
    while start and turn[start - 1] == turn[i] and i - start < _ANSWER_REACH:
        start -= 1
    if not parsed.spoken or (items[start].gap not in ("\n", "?") and items[i].gap != "?"):
        return False
    first = max(0, start - _QUESTION_REACH)
    asked = [k for k in range(first, start) if turn[k] >= turn[i] - 1]
    words = {items[k].word for k in asked}
    which = any(items[k].word == "which" and _is_sided(parsed, k + 1) for k in asked)
    return which or ("or" in words and bool(SIDES.keys() & words))


def _is_sided(parsed: Parsed, i: int) -> bool:
    """Whether item i is "side", "one" or a part of the body."""
    if parsed.stems[i] in ("side", "one") or parsed.items[i].number == 1:
        return True
    return PARTS.at(parsed.padded, parsed.stems, i) is not None
