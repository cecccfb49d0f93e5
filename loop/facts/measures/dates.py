"""Dates of a text, as far as they are stated."""

from typing import NamedTuple

from ..numerals import Item
from .units import UNITS

_ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"""
ORDINALS = {word: i for i, word in enumerate(_ORDINALS.split(), 1)} | {"thirtieth": 30}
_MONTHS = """january february march april may june july august september october november
    december"""
MONTHS = {name: i for i, name in enumerate(_MONTHS.split(), 1)}
MONTHS |= {name[:3]: i for name, i in MONTHS.items() if name != "may"} | {"sept": 9}
_HOLIDAYS = {"christmas": (12, 25), "halloween": (10, 31), "valentine's": (2, 14)}
_SUFFIXES = ("st", "nd", "rd", "th")
_BEFORE_MONTH = ("in", "since", "of", "last", "this", "until", "by", "early", "late", "mid", "next")
WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_BEFORE_WEEKDAY = frozenset("since on last this next by until from".split())
DAY_WORDS = frozenset((*ORDINALS, *MONTHS, *WEEKDAYS, *_HOLIDAYS))


class Date(NamedTuple):
    """A date that begins at some item, such as "m7 d29 y2008" without what is not stated.

    A weekday is one of its own.
    """

    value: str
    num_items: int


def date_at(text: str, items: list[Item], i: int) -> Date | None:
    """The date that begins at item i; None where none does.

    A year alone is a date. A month alone is one after a word such as "in". items: with some empty
    ones behind the last.
    """
    window = items[i : i + 6]
    previous = items[i - 1].word if i else ""
    if window[0].number is not None:
        return _numeric(text, window) or _day_first(window) or _bare_year(window)
    if window[0].word in MONTHS:
        return _month_first(window, previous)
    if window[0].word in _HOLIDAYS:
        return _holiday(window)
    if window[0].word in WEEKDAYS:
        return Date(window[0].word, 1) if previous in _BEFORE_WEEKDAY else None
    return _day_first(window) if window[0].word in ORDINALS else None


def _numeric(text: str, window: list[Item]) -> Date | None:
    """ "7/29/2008", "7-29-08", "7/2008" and "12-2019"."""
    numbers = [window[0].number]
    items, slashes = 1, False
    while len(numbers) < 3 and items + 1 < len(window):
        slash = window[items].word == "/"
        following = window[items + 1] if slash else window[items]
        dash = text[window[items - 1].end : following.start] == "-"
        if slash == dash or (items > 1 and slash != slashes):
            break
        slashes = slash
        if following.number is None or not (slash or dash):
            break
        numbers.append(following.number)
        items += 2 if slash else 1
    if any(n is None or n != int(n) for n in numbers):
        return None
    whole = [int(n) for n in numbers if n is not None]
    if not slashes and 1900 <= whole[0] < 2100 and len(whole) > 1 and 1 <= whole[1] <= 12:
        day = f" d{whole[2]}" if len(whole) == 3 else ""
        return Date(f"m{whole[1]}{day} y{whole[0]}", items)
    if len(whole) == 3 and 1 <= whole[0] <= 12 and 1 <= whole[1] <= 31:
        return Date(f"m{whole[0]} d{whole[1]} y{_full_year(whole[2])}", items)
    if len(whole) == 2 and 1 <= whole[0] <= 12 and 1900 <= whole[1] < 2100:
        return Date(f"m{whole[0]} y{whole[1]}", items)
    return None


def _full_year(year: int) -> int:
    """2008 of 8, 1998 of 98."""
    if year < 50:
        return year + 2000
    return year + 1900 if year < 100 else year


def _month_first(window: list[Item], previous: str) -> Date | None:
    """ "July 29th 2008", "July of 2008", "July twenty ninth" or "in July"."""
    value = f"m{MONTHS[window[0].word]}"
    count = 1
    day = _day(window, 1)
    if day:
        value, count = f"{value} d{day[0]}", 1 + day[1]
    if window[count].word == "of":
        count += 1
    year = _year(window[count])
    if year is not None:
        return Date(f"{value} y{year}", count + 1)
    if day is None and previous not in _BEFORE_MONTH:  # "she may come"
        return None
    if (
        day is None
        and window[0].word in ("may", "march", "mar")
        and previous not in ("in", "since")
    ):
        return None
    return Date(value, 1 + (day[1] if day else 0))


def _holiday(window: list[Item]) -> Date:
    """ "Christmas of 2018"."""
    month, day = _HOLIDAYS[window[0].word]
    behind = 1 + (window[1].word in ("day", "of", "in"))
    year = _year(window[behind])
    value = f"m{month} d{day}"
    return Date(value, 1) if year is None else Date(f"{value} y{year}", behind + 1)


def _day_first(window: list[Item]) -> Date | None:
    """ "19 June 2019", "nineteenth of June"."""
    day = _day(window, 0)
    if day is None:
        return None
    number, count = day
    if window[count].word == "of":
        count += 1
    month = MONTHS.get(window[count].word)
    if month is None or (window[count].word in ("may", "mar", "dec", "sat") and count == 1):
        return None
    year = _year(window[count + 1])
    if year is not None:
        return Date(f"m{month} d{number} y{year}", count + 2)
    return Date(f"m{month} d{number}", count + 1)


def _day(window: list[Item], i: int) -> tuple[int, int] | None:
    """(day, its items) of "29", "29th", "third" or "twenty ninth" at item i."""
    day, following = window[i], window[i + 1]
    is_unit = following.word in UNITS and following.word not in ORDINALS  # "second" is both
    if day.number is None or day.number not in range(1, 32) or is_unit:
        ordinal = ORDINALS.get(day.word)
        return None if ordinal is None else (ordinal, 1)
    ones = ORDINALS.get(following.word, 0)
    if day.number in (20, 30) and 0 < ones < 10:
        return int(day.number) + ones, 2
    return int(day.number), 2 if following.word in _SUFFIXES else 1


def _year(item: Item) -> int | None:
    if item.number is None or item.number not in range(1900, 2100):
        return None
    return int(item.number)


def _bare_year(window: list[Item]) -> Date | None:
    """ "2008", but neither "2000 mg" nor the first number of "2000/1"."""
    year = _year(window[0])
    following = window[1].word
    if year is None or (following in UNITS and not window[1].gap) or following == "/":
        return None
    return Date(f"y{year}", 1)
