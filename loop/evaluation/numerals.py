"""The numbers of a text, written in digits or spelled out, each with its place.

Speech spells numbers out: "one twenty over eighty" is 120 over 80. The libraries that turn words into digits lose the place in the text, which
the marks on the page need, and read "one twenty" as 1 and 20 (text2num 3.1)."""

import itertools
import re
from typing import NamedTuple

ONES = {w: i for i, w in enumerate("zero one two three four five six seven eight nine".split())}
TEENS = {
    w: i
    for i, w in enumerate(
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
        10,
    )
}
TENS = {
    w: 10 * i
    for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
DIGITS = ONES | {"oh": 0, "o": 0}  # behind "point"
NO_DECIMAL = (
    "this",
    "that",
    "the",
    "some",
    "what",
    "which",
    "one",
)  # before a "point" that is no number's
_LIST_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)](?=\s)", re.MULTILINE)
# A code (b12, a1c, covid-19), a time of day and a decade (80s) are words, not numbers.
_TOKEN = re.compile(
    r"covid-\d+|[a-z]+\d\w*|\d+:\d\d|\d+s\b|\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])\.\d+|(?:[a-z]\.){2,}|[a-z]+(?:'[a-z]+)?|[/%°]"
)


class Item(NamedTuple):
    """A word, or a number from one or more of them."""

    word: str
    number: float | None
    start: int
    end: int


def _spoken(words: list[str], at: int) -> tuple[float, int] | None:
    """The number that begins at a word, and where the next word is. "one twenty" and "nineteen ninety" are read in pairs, as people say
    pressures and years."""
    total, current, i = 0, 0, at
    while i < len(words):
        word, room = words[i], current % 100 == 0
        if word in ONES and (room or (current % 100 >= 20 and current % 10 == 0)):
            current += ONES[word]
        elif room and (word in TEENS or word in TENS):
            current += TEENS.get(word) or TENS[word]
        elif word == "hundred" and (i == at or 0 < current < 100):
            current = (current or 1) * 100
        elif word == "thousand" and 0 < current < 1000:
            total, current = total + 1000 * current, 0
        elif (
            word in ("a", "one") and words[i + 1 : i + 2] in (["hundred"], ["thousand"]) and i == at
        ):
            current = 1
        elif not (
            word == "and"
            and i > at
            and words[i - 1] in ("hundred", "thousand")
            and _spoken(words, i + 1)
        ):
            break
        i += 1
    if i == at or words[i - 1] == "and":
        return None
    value: float = total + current
    following = (
        _spoken(words, i) if 0 < value <= 20 and i < len(words) and words[i] not in ONES else None
    )
    if following and 10 <= following[0] < 100:
        return value * 100 + following[0], following[1]
    if (
        words[i : i + 1] in (["oh"], ["o"])
        and words[i + 1 : i + 2]
        and words[i + 1] in ONES
        and 0 < value <= 20
    ):
        return value * 100 + ONES[words[i + 1]], i + 2
    return value, i


def items_of(text: str) -> list[Item]:
    """The words, numbers and signs (/ % °) of a text, lower-case. A list's own numbers at the start of lines are left out."""
    text = _LIST_NUMBER.sub(lambda mark: " " * len(mark.group()), text.lower())
    tokens = [
        (m.group().replace(".", "") if m.group()[0].isalpha() else m.group(), m.start(), m.end())
        for m in _TOKEN.finditer(text)
    ]
    # Words belong to one number only where nothing but a space or a hyphen stands between them.
    items: list[Item] = []
    i = 0
    while i < len(tokens):
        run = i + 1
        while run < min(len(tokens), i + 40) and text[tokens[run - 1][2] : tokens[run][1]] in (
            " ",
            "-",
        ):
            run += 1
        words = [t[0] for t in tokens[i:run]]
        number = (
            (float(words[0].replace(",", "")), 1)
            if re.fullmatch(r"[\d.,]+", words[0])
            else _spoken(words, 0)
        )
        value, taken = number or (
            (0.0, 0)
            if words[0] == "point" and not (i and tokens[i - 1][0] in NO_DECIMAL)
            else (None, 1)
        )
        if value is not None and words[taken : taken + 1] == ["point"]:
            digits = [
                str(DIGITS.get(w, w))
                for w in itertools.takewhile(
                    lambda w: w in DIGITS or w.isdigit(), words[taken + 1 :]
                )
            ]
            if digits or not number:  # "point" alone is a word
                value, taken = (
                    (float(f"{value:.0f}.{''.join(digits)}"), taken + 1 + len(digits))
                    if digits
                    else (None, 1)
                )
        elif value is not None and words[taken : taken + 3] == ["and", "a", "half"]:
            value, taken = value + 0.5, taken + 3
        items.append(
            Item(words[0] if value is None else "", value, tokens[i][1], tokens[i + taken - 1][2])
        )
        i += taken
    return items
