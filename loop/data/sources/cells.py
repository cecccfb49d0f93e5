"""One cell of a row: which column it is of, and whether it holds a text that can be learned from.

A `BadRow` says what is wrong and what to do, and never quotes the cell: its words may be a
patient's.
"""

import math
import re
import unicodedata
from typing import Any

from .readers import MAX_ROW_BYTES, BadRow, clean_text

MAX_LISTED_COLUMNS = 12
# What looks like nothing, though Unicode counts these among the letters and signs.
INVISIBLE = set("\u034f\u115f\u1160\u2800\u3164\uffa0\ufe0e\ufe0f")
# What exports write where there is nothing, and Excel where a formula failed. "None" and "N/A" are
# not among them: clinicians write these.
NO_VALUE = re.compile(
    r"(?:null|nan|\\N|<na>|<null>|undefined|#N/A|#(?:REF|NULL|NUM|VALUE)!|#DIV/0!|#NAME\?)",
    re.IGNORECASE,
)
# A line break written as two signs, before a heading or a speaker.
ESCAPED_BREAK = re.compile(r"\\n[ \t*#]*[A-Z][\w ./]{0,30}:")
# A list as JSON or Python writes it: its speakers and brackets would be learned as they are.
WRITTEN_LIST = re.compile(r"\s*\[\s*(?:\{.*\}|\".*\"|'.*')\s*\]\s*", re.DOTALL)
# What to do about a cell that is no text, by its type.
REMEDIES = {
    "NoneType": "fill it or remove the row",
    "list": "join its parts to one text, a line for each",
    "dict": "join its parts to one text, a line for each",
    "bytes": "decode it to a text",
}


def pick(row: dict, names: list[str]) -> Any:
    """The first of these columns that the row has. Raises BadRow.

    A name `a.b` also means the b of an object a.
    """
    for name in names:
        if name in row:
            return row[name]
        inner: Any = row
        for part in name.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is not None:
            return inner
    wanted = " or ".join(map(repr, names))
    raise BadRow(f"no column {wanted}, only {_columns(row)}: {_hint(row)}")


def _columns(row: dict) -> str:
    """The names of a row's columns, where they are names.

    In a file without a header, a patient's words stand where the names should be.
    """
    if all(re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", str(name)) for name in row):
        return ", ".join(list(row)[:MAX_LISTED_COLUMNS])
    what = "has the file a header?"
    if len(row) == 1:
        what = "has the file a header, and commas, semicolons, tabs or bars between columns?"
    return f"{len(row)} that don't look like names ({what})"


def _hint(row: dict) -> str:
    """What to do about a row that lacks a column."""
    if row and all(isinstance(value, (dict, list)) for value in row.values()):
        return (
            "the rows seem to be inside of it: write an array of rows, or a row a line; "
            "a.b in data.columns names the b of an object a"
        )
    return "map it with data.columns"


def check_id(key: Any) -> str:
    """The id as a text: a number, or 1 to 100 characters without a blank. Raises BadRow."""
    if isinstance(key, float) and key.is_integer():
        key = int(key)  # as spreadsheets write whole numbers
    if isinstance(key, (list, dict)):
        raise BadRow(
            f"its id is {type(key).__name__}: where the file has its columns one after another, "
            "write it a row a line (pandas: orient='records', lines=True)"
        )
    number = isinstance(key, (int, float)) and not isinstance(key, bool) and math.isfinite(key)
    if not number and not (isinstance(key, str) and re.fullmatch(r"[^\s\ud800-\udfff]+", key)):
        if isinstance(key, str) and re.search("[\ud800-\udfff]", key):
            raise BadRow("its id is not UTF-8, or holds half a surrogate pair: save as UTF-8")
        raise BadRow(
            "its id must be a number, or 1 to 100 characters without a blank, and "
            f"{_what_is_no_id(key)}: write _ for blanks, or map another column as data.columns.id"
        )
    if len(str(key)) > 100:
        raise BadRow("its id must be at most 100 characters long: map another as data.columns.id")
    return str(key)


def _what_is_no_id(key: Any) -> str:
    if isinstance(key, str):
        return "has blanks" if key.strip() else "is empty"
    if key is None or isinstance(key, float):
        return "is empty"
    return f"is {type(key).__name__}"


def check_text(value: Any, name: str) -> str:
    """The value, which must be a text with a word in it, in UTF-8 and not huge. Raises BadRow."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRow(f"{name} is {kind}, not a text: {REMEDIES.get(kind, 'write it as one')}")
    if not has_words(value):
        raise BadRow(f"{name} is empty: fill it or remove the row")
    if NO_VALUE.fullmatch(value.strip()):
        raise BadRow(f"{name} is {value.strip()}, a word for nothing: fill it or remove the row")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise BadRow(
            f"{name} is not UTF-8, or holds half a surrogate pair: save as UTF-8"
        ) from None
    if size > MAX_ROW_BYTES:
        raise BadRow(
            f"{name} has {size / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: "
            "split it or remove the row"
        )
    if "\0" in value:
        raise BadRow(f"{name} holds the sign NUL: write the file again without it")
    if WRITTEN_LIST.fullmatch(value):
        raise BadRow(
            f"{name} is a list written as a text: join its parts to one text, a line for each"
        )
    if "\n" not in value and ESCAPED_BREAK.search(value):
        raise BadRow(
            f"{name} has line breaks written as \\n, two signs: write the file again with real ones"
        )
    return clean_text(value)


def has_words(text: str) -> bool:
    """Whether a text is more than blanks, control signs and signs of width zero."""
    return any(
        not character.isspace()
        and character not in INVISIBLE
        and unicodedata.category(character) not in ("Cc", "Cf")
        for character in text
    )
