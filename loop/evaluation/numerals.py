"""Finds the numbers of a text, in digits or spelled out, and where each stands.

Speech spells numbers out: "one twenty over eighty" is 120 over 80. Libraries that turn words into
digits lose the positions in the text, which the HTML report needs for its marks, and they read
"one twenty" as 1 and 20 (text2num 3.1).
"""

import itertools
import re
from typing import NamedTuple

ONES = {w: i for i, w in enumerate("zero one two three four five six seven eight nine".split())}
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
TEENS_AND_TENS = {word: 10 + i for i, word in enumerate(_TEENS)}
TEENS_AND_TENS |= {word: 20 + 10 * i for i, word in enumerate(_TENS)}
DIGITS = ONES | {"oh": 0, "o": 0}  # after "point"
# Before a "point" that belongs to no number, as in "at this point five of us".
NOT_BEFORE_DECIMALS = ("this", "that", "the", "some", "what", "which", "one")
MAX_NUMBER_WORDS = 40  # words that are read as one number at most
MAX_DIGITS = 15  # before the decimal point, that a float keeps; more of them stay a word
_LIST_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)](?=\s)", re.MULTILINE)
# A code (b12, a1c, covid-19), a time of day and a decade (80s) are words, not numbers.
_TOKEN = re.compile(
    r"covid-\d+"
    r"|[a-z]+\d\w*"
    r"|\d+:\d\d"
    r"|\d+s\b"
    r"|\d+(?:,\d{3})*(?:\.\d+)?"
    r"|(?<![\w.])\.\d+"
    r"|(?:[a-z]\.){2,}"
    r"|[a-z]+(?:'[a-z]+)?"
    r"|[/%°]"
)


class Item(NamedTuple):
    """A word or sign of a text, or a number that one or more words make."""

    word: str  # lower-case; "" for a number
    number: float | None  # None for a word
    start: int  # the item is text[start:end]
    end: int


class _Token(NamedTuple):
    word: str
    start: int
    end: int


def parse_items(text: str) -> list[Item]:
    """The words, numbers and signs (/ % °) of a text, lower-case, in its order.

    The numbers of a list at the start of lines ("1.", "2)") are left out. A number of more than
    MAX_DIGITS digits is the word of its digits.
    """
    text = _LIST_NUMBER.sub(lambda match: " " * len(match.group()), _lower(text))
    tokens = _tokenize(text)
    items: list[Item] = []
    i = 0
    while i < len(tokens):
        words = _adjacent_words(text, tokens, i)
        previous = tokens[i - 1].word if i else ""
        parsed = _parse_number(words, previous)
        if parsed is None:
            word = words[0].replace(",", "")
            items.append(Item(word, None, tokens[i].start, tokens[i].end))
            i += 1
        else:
            number, num_words = parsed
            end = tokens[i + num_words - 1].end
            items.append(Item("", number, tokens[i].start, end))
            i += num_words
    return items


def _lower(text: str) -> str:
    """The text in lower case, each character where it was; "İ", which has two then, is left."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _tokenize(text: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(text):
        word = match.group()
        if word[0].isalpha():
            word = word.replace(".", "")  # t.i.d. is tid
        tokens.append(_Token(word, match.start(), match.end()))
    return tokens


def _adjacent_words(text: str, tokens: list[_Token], start: int) -> list[str]:
    """The words from a token on, up to the first pair with more than a space or hyphen between.

    Only such words can belong to one number.
    """
    end = start + 1
    limit = min(len(tokens), start + MAX_NUMBER_WORDS)
    while end < limit and text[tokens[end - 1].end : tokens[end].start] in (" ", "-"):
        end += 1
    return [token.word for token in tokens[start:end]]


def _parse_number(words: list[str], previous: str) -> tuple[float, int] | None:
    """(the number that begins at words[0], how many words it has); None where none begins.

    previous: the word before these.
    """
    if words[0] == "point":
        digits = [] if previous in NOT_BEFORE_DECIMALS else _decimal_digits(words)
        return (float(f"0.{''.join(digits)}"), 1 + len(digits)) if digits else None
    parsed = _written_number(words[0]) or _spoken_number(words, 0)
    if parsed is None:
        return None
    value, count = parsed
    digits = _decimal_digits(words[count:])
    if digits:
        return float(f"{value:.0f}.{''.join(digits)}"), count + 1 + len(digits)
    if words[count : count + 3] == ["and", "a", "half"]:
        return value + 0.5, count + 3
    return value, count


def _written_number(word: str) -> tuple[float, int] | None:
    """(the number that a word of digits is, 1); None where it is too long."""
    if not re.fullmatch(r"[\d.,]+", word):
        return None
    digits = word.replace(",", "").lstrip("0")
    if len(digits.partition(".")[0]) > MAX_DIGITS:
        return None
    return float(digits or "0"), 1


def _decimal_digits(words: list[str]) -> list[str]:
    """The digits that follow a "point" at words[0]; one word may hold several."""
    if words[:1] != ["point"]:
        return []
    spoken = itertools.takewhile(lambda word: word in DIGITS or word.isdigit(), words[1:])
    return [str(DIGITS.get(word, word)) for word in spoken]


def _spoken_number(words: list[str], start: int) -> tuple[float, int] | None:
    """(the spelled-out number that begins at a word, the index after it)

    "one twenty", "one oh five" and "nineteen ninety" are read in pairs, as people say blood
    pressures and years.
    """
    cardinal = _cardinal(words, start)
    if cardinal is None:
        return None
    value, end = cardinal
    if not 0 < value <= 20:
        return value, end
    if end < len(words) and words[end] not in ONES:
        following = _spoken_number(words, end)
        if following and 10 <= following[0] < 100:
            return value * 100 + following[0], following[1]
    if words[end : end + 1] in (["oh"], ["o"]) and end + 1 < len(words) and words[end + 1] in ONES:
        return value * 100 + ONES[words[end + 1]], end + 2
    return value, end


Cardinals = dict[int, tuple[int, int] | None]  # what `_cardinal` returns, by `start`


def _cardinal(
    words: list[str], start: int, found: Cardinals | None = None
) -> tuple[int, int] | None:
    """(a cardinal such as "two hundred and five" that begins at a word, the index after it)

    found: those of these words that are known. Each "and" asks for what follows it, so that without
    them "one thousand and one thousand and ..." would take twice as long with each "and".
    """
    found = {} if found is None else found
    if start not in found:
        found[start] = _read_cardinal(words, start, found)
    return found[start]


def _read_cardinal(words: list[str], start: int, found: Cardinals) -> tuple[int, int] | None:
    thousands = 0
    current = 0  # what follows the thousands
    i = start
    while i < len(words):
        word = words[i]
        after_hundreds = current % 100 == 0
        after_tens = current % 100 >= 20 and current % 10 == 0
        if word in ONES and (after_hundreds or after_tens):
            current += ONES[word]
        elif word in TEENS_AND_TENS and after_hundreds:
            current += TEENS_AND_TENS[word]
        elif word == "hundred" and (i == start or 0 < current < 100):
            current = (current or 1) * 100
        elif word == "thousand" and 0 < current < 1000:
            thousands += 1000 * current
            current = 0
        elif word == "a" and i == start and words[i + 1 : i + 2] in (["hundred"], ["thousand"]):
            current = 1
        elif not (i > start and _joins_hundreds(words, i, found)):
            break
        i += 1
    if i == start or words[i - 1] == "and":
        return None
    return thousands + current, i


def _joins_hundreds(words: list[str], i: int, found: Cardinals) -> bool:
    """Whether words[i] is the "and" of "one hundred and five"."""
    return (
        words[i] == "and"
        and words[i - 1] in ("hundred", "thousand")
        and _cardinal(words, i + 1, found) is not None
    )
