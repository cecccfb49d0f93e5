"""Finds what names a patient in a text: phone numbers, mail, record numbers, full dates.

Only kinds are returned, never the text. It sees the written forms of American clinics, and digits
that are spoken one by one; names, addresses and what is misspelled it does not see.
"""

import re
from collections.abc import Iterator

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR = r"(?:19|20)\d\d"
_DIGIT = r"(?:zero|oh|o|one|two|three|four|five|six|seven|eight|nine)"
_RECORD = (
    r"(?:mrn|(?:medical |health |hospital )?record|chart|account|policy|member|insurance"
    r"|patient|medicare|medicaid|passport|license)"
)
_NUMBERED = r"(?: (?:number|no\.?|id|#))?"
# Every repetition is bounded, so that the time is linear in any text.
IDENTIFIERS = {
    "phone number": re.compile(
        r"(?<![\w.+-])(?:\+?1[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-])"
        r"|(?<!\w)\+\d{1,3}(?:[ .-]?\d{2,4}){3,4}(?!\d)"
        r"|\b(?:phone|cell|mobile|call(?: me| us)? (?:at|on)|tel|fax|pager)[a-z]{0,5}\W{0,3}"
        r"(?:number )?(?:is |at )?\W{0,2}(?:\d{3}[-. ]?\d{4}|\d{10})(?!\d)"
    ),
    "mail address": re.compile(
        r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.\w{2}"
        r"|\b[\w.]{1,64} at [\w]{1,63} dot (?:com|org|net|edu|gov)\b"
    ),
    "social security number": re.compile(
        r"(?<![\w-])\d{3}([- ])\d{2}\1\d{4}(?![\w-])"
        r"|\b(?:ssn|social security)(?: number| no\.?)?(?: is)?\W{0,3}\d{9}\b"
    ),
    "record number": re.compile(
        rf"\b{_RECORD}{_NUMBERED}(?: is)? ?[:#]? {{0,2}}#?[a-z]{{0,3}}-?\d(?:-?\d){{4,14}}\b"
    ),
    "full date": re.compile(
        rf"(?<![\d/.-])(?:\d{{1,2}}([/.-])\d{{1,2}}\1{_YEAR}|{_YEAR}-\d\d-\d\d)(?![\d/-])"
        rf"|\b{_MONTH} {_DAY},? {_YEAR}\b|\b{_DAY} (?:of )?{_MONTH},? {_YEAR}\b"
        r"|\b(?:dob|born(?: on)?|birth|birthday)(?: is)?\W{0,3}\d{1,2}[/.-]\d{1,2}[/.-]\d\d\b"
    ),
}
_SPOKEN = re.compile(rf"\b{_DIGIT}(?:[ ,.-]{{1,3}}{_DIGIT}\b){{6,15}}")  # a phone number
# Only the pieces around four digits with little between them are searched, as that is fast: all but
# mail addresses and spoken numbers have such, with fewer characters than these around them.
_DIGITS = re.compile(r"\d(?:\W{0,2}\d){3,}")
_BEFORE, _BEHIND = 80, 40
_PLAIN = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013", "-") | {"\u00a0": " "})


def find_identifiers(text: str) -> list[str]:
    """The kinds of identifier that a text holds, keys of IDENTIFIERS."""
    plain = text.lower().translate(_PLAIN)
    pieces = list(_around_digits(plain))
    places = {"mail address": [plain] if "@" in plain or " dot " in plain else []}
    found = {
        kind
        for kind, pattern in IDENTIFIERS.items()
        if any(map(pattern.search, places.get(kind, pieces)))
    }
    if _SPOKEN.search(plain):
        found.add("phone number")
    return [kind for kind in IDENTIFIERS if kind in found]


def _around_digits(text: str) -> Iterator[str]:
    """The pieces of a text that have four digits close together, and what stands around them."""
    start, end = 0, 0
    for match in _DIGITS.finditer(text):
        if match.start() - _BEFORE > end:
            yield text[start:end]
            start = match.start() - _BEFORE
        end = match.end() + _BEHIND
    yield text[start:end]
