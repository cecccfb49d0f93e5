"""Finds the numbers of a text, in digits or spelled out, and where each stands.

Speech spells numbers out: "one twenty over eighty" is 120 over 80. Libraries that turn words into
digits lose the positions in the text, which the marks of a report need, and they read
"one twenty" as 1 and 20 (text2num 3.1).
"""

import re
import unicodedata
from typing import NamedTuple

ONES = {w: i for i, w in enumerate("zero one two three four five six seven eight nine".split())}
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
TEENS_AND_TENS = {word: 10 + i for i, word in enumerate(_TEENS)}
TEENS_AND_TENS |= {word: 20 + 10 * i for i, word in enumerate(_TENS)}
DIGITS = ONES | {"oh": 0, "o": 0}  # after "point"
# Before a "point" that belongs to no number, as in "at this point five of us".
NOT_BEFORE_DECIMALS = ("this", "that", "the", "some", "what", "which", "one")
_NUMBER_STARTS = frozenset(
    (*ONES, *TEENS_AND_TENS, "a", "hundred", "point", *"\u00bc\u00bd\u00be\u2153\u2154\u215b")
)
_TEMPERATURES = range(96, 106)  # in Fahrenheit, whose tenth is said without "point"
MAX_NUMBER_WORDS = 40  # words that are read as one number at most
MAX_DIGITS = 15  # before the decimal point, that a float keeps; more of them stay a word
_EVERY = re.compile(r"\bq\.(?=\s?\d)")  # of "q.6 h."
# What speakers say twice.
_STUTTERED = frozenset(
    """a an the i you he she we they it it's i'm my your his her our of to in on at for with and or
    is are was were have has had that this if so""".split()
)
_LIST_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)](?=\s)", re.MULTILINE)
# "[00:12:40]", "00:01,500 --> 00:04,000", "12:40 " or "[740s]" at the start of a line: a recorder's
# clock says nothing. A clock in brackets is one anywhere.
_CLOCK = r"\d{1,3}:\d\d(?::\d\d)?(?:[.,]\d{1,3})?"
_TIMESTAMP = re.compile(
    rf"[\[(<{{]\s*{_CLOCK}(?:\s*(?:-->|[-\u2013])\s*{_CLOCK})?\s*[\])>}}]"
    rf"|{_CLOCK}\s*-->\s*{_CLOCK}"
    r"|\b\d{1,2}:\d\d:\d\d(?:[.,]\d{1,3})?\b"
    rf"|^[ \t]*{_CLOCK}(?=\s*(?:[-\u2013|]|\w[\w .]{{0,30}}:|$))"
    r"|^[ \t]*[\[(<{]\s*\d[\d.,]*\s*(?:s|sec|secs|seconds?)?\s*[\])>}]",
    re.MULTILINE,
)
_ROLES = "doctor dr patient pt speaker person participant voice clinician provider physician nurse"
_ROLES += " guest guest_family guest_clinician spk interviewer caller agent parent mother father"
# "Doctor:", "40 Doctor (00:40):", "#3 [Speaker 2]" and "line 40:" at the start of a line.
_ROLE = rf"(?:{'|'.join(_ROLES.split())}|[dps](?=\s*\d*:))"
_LABEL = re.compile(
    rf"^[ \t]*{_ROLE}[ \t]+(?:\d{{1,3}}|{_CLOCK})[ \t]*$"
    rf"|^[^a-z\n]{{0,40}}{_ROLE}(?![a-z])(?:[ .#,-]{{0,3}}\w{{1,20}}){{0,3}}[ *\])]{{0,4}}"
    r"(?:[(\[][^\n)\]]{0,20}[)\]])?\s?:"
    rf"|^[^a-z\n]{{0,9}}[(\[<{{]{_ROLE}[^\n)\]>}}]{{0,30}}[)\]>}}]"
    r"|^[ \t#]*(?:(?:line|turn|segment)[ \t]*#?)?\d{1,4}:(?=\s)",
    re.MULTILINE,
)
# A code (b12, a1c, covid-19), a time of day and a decade (80s) are words, not numbers.
_TOKEN = re.compile(
    r"covid-\d+"
    r"|[a-z\u00b5\u03bc]+\d\w*"
    r"|\d+:\d\d"
    r"|\d+'?s\b"
    r"|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])"
    r"|\d+,\d{1,2}(?![\d,])"
    r"|\d+(?:\.\d+)?"
    r"|(?<![\w.])\.\d+"
    r"|(?:[a-z]\.)+[a-z]\b(?!')\.?|(?:[a-z]\.){2,}"
    r"|[a-z\u00b5\u03bc]+(?:'[a-z]+)?"
    r"|[\u00bc-\u00be\u2153-\u215e]"
    r"|[/%\u00b0+]"
    r"|[.,;:?!()\n\u2022]"
)
_SPELLED = re.compile(r"\b[A-Z](?: [A-Z])+\b(?!')")  # "H I V", as transcripts write it
_FRACTIONS = {sign: unicodedata.numeric(sign) for sign in "\u00bc\u00bd\u00be\u2153\u2154\u215b"}
_BREAKS = {sign: rank for rank, sign in enumerate("(),:;.!?\n\u2022")}  # from the weakest on


_SPEAKER = re.compile(
    rf"^[^a-z\n]*(?:{'|'.join(_ROLES.split())})\b[\w ._#]{{0,30}}[*\])]*:", re.MULTILINE
)


JOINS = ("to", "or", "through", "and")  # of a range


class Item(NamedTuple):
    """A word or sign of a text, or a number that one or more words make."""

    word: str  # lower-case; "" for a number
    number: float | None  # None for a word
    start: int  # the item is text[start:end]
    end: int
    gap: str  # the strongest of ( ) , : ; . ! ? and line break between it and the item before


def together(items: list[Item], first: int, last: int) -> bool:
    """Whether no sentence and no clause ends between two items."""
    return all(items[k].gap in ("", "(", ")") for k in range(first + 1, last + 1))


def blank_labels(text: str) -> str:
    """The lower-case text with blanks for timestamps, speakers and a list's numbers.

    Each character stays where it was. The numbers of a list are "1." and "2)" at the start of
    lines.
    """
    text = _SPELLED.sub(lambda match: match.group().replace(" ", "."), text)
    text = _lower(text).replace("\u2019", "'").replace("\u2018", "'")
    text = _EVERY.sub("q ", text)
    for pattern in (_TIMESTAMP, _LIST_NUMBER, _LABEL):
        text = pattern.sub(lambda match: " " * len(match.group()), text)
    return text


def count_speakers(text: str) -> int:
    """The lines of a text that begin with who speaks, such as "Doctor:"."""
    return len(_SPEAKER.findall(_lower(text)))


def parse_items(text: str) -> list[Item]:
    """The words, numbers and signs (/ % ° +) of a text, lower-case, in its order.

    What `blank_labels` blanks is left out. A number of more than MAX_DIGITS digits is the word of
    its digits.
    """
    text = blank_labels(text)
    tokens = _tokenize(text)
    items: list[Item] = []
    gap = ""
    i = 0
    while i < len(tokens):
        word, start, end = tokens[i]
        if word in _BREAKS:
            if not gap or _BREAKS[word] > _BREAKS[gap]:
                gap = word
            i += 1
            continue
        parsed = None
        if word[0].isdigit() or word[0] == "." or word in _NUMBER_STARTS:
            parsed = _parse_number(text, tokens, i)
        if parsed is None and word in _STUTTERED and items and items[-1].word == word and not gap:
            i += 1  # "a a day"
        elif parsed is None:
            items.append(Item(word.replace(",", ""), None, start, end, gap))
            i += 1
        else:
            number, num_tokens = parsed
            i += num_tokens
            items.append(Item("", number, start, tokens[i - 1].end, gap))
        gap = ""
    return items


def _lower(text: str) -> str:
    """The text in lower case, each character where it was; "İ", which has two then, is left."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


class _Token(NamedTuple):
    word: str
    start: int
    end: int


def _tokenize(text: str) -> list[_Token]:
    """The words, numbers, signs and breaks; t.i.d. is "tid", and covid-19 "covid"."""
    return [
        _Token(
            word.replace(".", "").partition("-")[0] if word[0].isalpha() else word,
            match.start(),
            match.end(),
        )
        for match in _TOKEN.finditer(text)
        for word in [match.group()]
    ]


def _parse_number(text: str, tokens: list[_Token], i: int) -> tuple[float, int] | None:
    """(the number that begins at token i, how many tokens it has); None where none begins."""
    word = tokens[i].word
    if word in _FRACTIONS:
        return _FRACTIONS[word], 1
    words = _adjacent_words(text, tokens, i)
    parsed = _read_number(words, tokens[i - 1].word if i else "")
    if parsed is None:
        return None
    value, count = parsed
    behind = tokens[i + count : i + count + 4]
    if value < 1000 and value == int(value) and behind:
        if behind[0].word in _FRACTIONS:
            return value + _FRACTIONS[behind[0].word], count + 1
        signs = [token.word for token in behind[:3]]
        if word[0].isdigit() and _is_fraction(text, tokens[i].end, behind) and count == 1:
            return value + int(signs[0]) / int(signs[2]), count + 3
        decimals = _spaced_decimals(text, behind)
        if decimals:
            return float(f"{value:.0f}.{decimals}"), count + 2
    return value, count


def _is_fraction(text: str, end: int, behind: list[_Token]) -> bool:
    """Whether "1/2" follows the whole number that ends there, as in "2-1/2" and "1 1/2"."""
    if len(behind) < 3 or behind[1].word != "/" or text[end : behind[0].start] not in (" ", "-"):
        return False
    above, below = behind[0].word, behind[2].word
    together = behind[2].end - behind[0].start == 3
    return together and above in "123" and below in "2348" and int(above) < int(below)


def _spaced_decimals(text: str, behind: list[_Token]) -> str:
    """The decimals of "six . eight" and "98 . 6", as some transcripts write 6.8 and 98.6."""
    if len(behind) < 2 or behind[0].word != ".":
        return ""
    point, digit = behind[0], behind[1]
    if text[point.start - 1] != " " or text[point.end : digit.start] != " ":
        return ""
    word = digit.word
    if word.isdecimal() and len(word) < 3:
        return word
    value = DIGITS.get(word, TEENS_AND_TENS.get(word))
    return "" if value is None else str(value)


def _adjacent_words(text: str, tokens: list[_Token], start: int) -> list[str]:
    """The words from a token on, up to the first pair with more than a space or hyphen between.

    Only such words can belong to one number.
    """
    end = start + 1
    limit = min(len(tokens), start + MAX_NUMBER_WORDS)
    while end < limit and text[tokens[end - 1].end : tokens[end].start] in (" ", "-"):
        end += 1
    return [token.word for token in tokens[start:end]]


def _read_number(words: list[str], previous: str) -> tuple[float, int] | None:
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
    if value in _TEMPERATURES and words[count : count + 1] and words[count] in ONES:
        if not words[0][0].isdigit() and _ends_number(words[count + 1 : count + 2]):
            return value + ONES[words[count]] / 10, count + 1  # "ninety eight six"
    if words[count : count + 3] == ["and", "a", "half"]:
        return value + 0.5, count + 3
    return value, count


def _ends_number(following: list[str]) -> bool:
    """Whether no word of a number, and no unit of time or share, goes on a number."""
    return not following or following[0] in ("degrees", "fahrenheit", "today", "and", ".")


def _written_number(word: str) -> tuple[float, int] | None:
    """(the number that a word of digits is, 1); None where it is too long."""
    if not re.fullmatch(r"[\d.,]+", word):
        return None
    if re.fullmatch(r"\d+,\d{1,2}", word):  # a decimal comma
        word = word.replace(",", ".")
    digits = word.replace(",", "").lstrip("0")
    if len(digits.partition(".")[0]) > MAX_DIGITS:
        return None
    return float(digits or "0"), 1


def _decimal_digits(words: list[str]) -> list[str]:
    """The digits that follow a "point" at words[0]; one word may hold several."""
    if words[:1] != ["point"]:
        return []
    digits: list[str] = []
    for word, previous in zip(words[1:], words):
        if word in TEENS_AND_TENS:
            digits.append(str(TEENS_AND_TENS[word]))
        elif word in ONES and digits and TEENS_AND_TENS.get(previous, 0) >= 20:
            digits[-1] = str(TEENS_AND_TENS[previous] + ONES[word])
            digits.append("")  # one for each word
        elif word in DIGITS or word.isdigit():
            digits.append(str(DIGITS.get(word, word)))
        else:
            break
    return digits


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
        hundreds_follow = current >= 100 and words[i + 1 : i + 2] == ["hundred"]
        if word in ONES and (after_hundreds or after_tens) and not hundreds_follow:
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
