"""How often something happens: "b.i.d.", "every 4 to 6 hours", "3 days a week", "on Mondays"."""

import re

from ..numerals import JOINS, Item, together
from .dates import WEEKDAYS
from .units import DAYS, DOSES, UNITS, Amount

_TIMES = {"once": 1.0, "twice": 2.0, "thrice": 3.0}
_PERIODS = {unit: unit for unit in ("hour", "day", "week", "month", "year")}
_PERIODS |= {"daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}
_PERIODS |= {"annually": "year", "hourly": "hour"}
_PERIODS |= dict.fromkeys(("nightly", "morning", "evening", "night", "bedtime", "noon"), "day")
_PERIODS |= dict.fromkeys(
    "monday tuesday wednesday thursday friday saturday sunday weekend".split(), "week"
)
_PER_DAY = ("day", "week", "month", "night", "hour")
_LATIN: dict[str, float] = {
    "bid": 2,
    "bd": 2,
    "tid": 3,
    "tds": 3,
    "qid": 4,
    "qds": 4,
    "qd": 1,
    "qam": 1,
    "qpm": 1,
}
_LATIN |= {"qhs": 1, "hs": 1, "mane": 1, "nocte": 1, "qod": 0.5, "qday": 1, "qwk": 1 / 7}
_ADVERBS = {
    "fortnightly": 1 / 14,
    "daily": 1,
    "nightly": 1,
    "hourly": 24,
    "weekly": 1 / 7,
    "monthly": 1 / 30,
}
_LATIN |= {"mwf": 3 / 7, "tts": 3 / 7}
_EVERY = re.compile(r"q(\d{1,2})(h|hr|hrs|hours|d|days|wk|w|weeks|mo|m)")  # q8h
_EVERY_UNIT = {"h": 24.0, "d": 1.0, "w": 1 / 7, "m": 1 / 30}
_AT_NIGHT = frozenset("qhs hs qpm nocte nightly night bedtime bed evening".split())
_IN_THE_MORNING = frozenset("qam mane morning".split())
_WEEKDAYS = frozenset(
    "mondays tuesdays wednesdays thursdays fridays saturdays sundays weekends".split()
)
_LISTED_WEEKDAYS = 3  # "Monday, Wednesday, Friday" without "on" are so many at least
# Parts of a day that a drug is taken at: "in the morning and at bedtime" is twice.
_DAY_PARTS = {"am": "morning", "breakfast": "morning", "morning": "morning"}
_DAY_PARTS |= dict.fromkeys("noon lunch lunchtime midday afternoon".split(), "noon")
_DAY_PARTS |= dict.fromkeys("pm evening night dinner supper bedtime bed".split(), "night")
_BEFORE_PART = frozenset("in the at before with each every after".split())
_TWICE_A_DAY = 2  # parts at least, that make a frequency
# What `frequency_at` may begin with, besides numbers and "every" and the like.
FREQUENCY_WORDS = frozenset((*_DAY_PARTS, *WEEKDAYS, "with", "after", "mwf", "tts"))


def frequency_at(items: list[Item], i: int) -> Amount | None:
    """The frequency that begins at item i, with its time of day; None where none does."""
    often = _frequency(items, i)
    if often is None:
        return None
    words = {item.word for item in items[i : i + often.num_items]}
    if words & _AT_NIGHT and words & _IN_THE_MORNING:
        return often
    if words & _AT_NIGHT:
        return often._replace(at="night")
    if words & _IN_THE_MORNING:
        return often._replace(at="morning")
    return often


def _frequency(items: list[Item], i: int) -> Amount | None:
    word, following = items[i].word, items[i + 1].word
    parts, count = _day_parts(items, i)
    if parts >= _TWICE_A_DAY:
        return _often(parts, count)
    if word in _LATIN:
        return _often(_LATIN[word], 1)
    match = _EVERY.fullmatch(word) if word[:1] == "q" else None
    if match and int(match[1]):
        return _often(_EVERY_UNIT[match[2][0]] / int(match[1]), 1)
    if re.fullmatch(r"q[1-9]\d?", word):
        return _every_so_many(items, i)
    if word in ("every", "each", "q") and together(items, i, i + 1):
        return _every(items, i)
    if word == "alternate" and following in ("day", "days", "night", "nights"):
        return _often(0.5, 2)
    if word in ("at", "before", "in") and following in ("bedtime", "night", "bed"):
        return _often(1, 2)
    if (word, following) == ("in", "the") and items[i + 2].word in ("morning", "evening"):
        return _often(1, 3)
    if word == "x" and items[i + 1].number and items[i + 2].word in _PERIODS:  # x3 daily
        return _per(items, i + 2, items[i + 1].number or 1.0, 2)
    if word in ("a", "per", "/") and following in _PER_DAY and i and _counts(items, i - 1):
        return _often(1 / DAYS[_PERIODS[following]], 2)
    weekdays, count = _weekdays(items, i + 1) if word == "on" else _weekdays(items, i)
    if weekdays and (word == "on" or weekdays >= _LISTED_WEEKDAYS):
        return _often(weekdays / 7, count + (word == "on"))
    days, count = _days_a_week(items, i)
    if count:
        return _often(days / 7, count)
    times, most, count = _times(items, i)
    if count:
        return _per(items, i + count, times, count, most)
    if items[i].number and following == "hourly":  # "8-hourly"
        return _often(24 / (items[i].number or 1.0), 2)
    if word == "od" and i and UNITS.get(items[i - 1].word) in DOSES:
        return _often(1, 1)
    if word in _ADVERBS:
        return _often(_ADVERBS[word], 1)
    return None


def _every_so_many(items: list[Item], i: int) -> Amount | None:
    """ "q2 weeks", "q4-6h", "q4 to 6 hours"."""
    low, end = float(items[i].word[1:]), i + 1
    joined = end + (items[end].word in JOINS[:2])
    high = items[joined].number
    end = joined + 1 if high else end
    unit = "hour" if items[end].word == "h" else UNITS.get(items[end].word, "")
    if unit not in _PERIODS or not together(items, i, end):
        return None
    return _often(1 / (low * DAYS[unit]), end + 1 - i, 1 / ((high or low) * DAYS[unit]))


def _day_parts(items: list[Item], i: int) -> tuple[int, int]:
    """(parts of a day, items) of "in the morning and one at night" from item i on."""
    named: set[str] = set()
    count, k = 0, i
    while True:
        while items[k].word in _BEFORE_PART and items[k].gap in ("", ","):
            k += 1
        part = _DAY_PARTS.get(items[k].word)
        if part is None or (k > i and items[k].gap not in ("", ",")):
            return len(named), count
        named.add(part)
        count = k + 1 - i
        joined = items[k + 1].word == "and"
        k += 1 + joined
        if not joined and items[k].gap != ",":
            return len(named), count
        k += items[k].word in ("a", "again") or items[k].number in (1, 2)  # "and one at night"


def _weekdays(items: list[Item], i: int) -> tuple[int, int]:
    """(days, items) of "Mondays, Wednesdays and Fridays" from item i on.

    One day alone is no habit: "on Monday" is a date.
    """
    days, end = 0, i
    plural = items[i].word in _WEEKDAYS
    while items[end].word in _WEEKDAYS | {*WEEKDAYS} or (days and items[end].word == "and"):
        days, end = days + (items[end].word != "and"), end + 1
    return (days, end - i) if plural or days > 1 else (0, 0)


def _days_a_week(items: list[Item], i: int) -> tuple[float, int]:
    """(days, items) of "3 days a week" and "one night per week"; (0, 0) where none are said."""
    words = [item.word for item in items[i + 1 : i + 5]]
    if not items[i].number or words[:1] not in (["day"], ["days"], ["night"], ["nights"]):
        return 0.0, 0
    for joins in (["a"], ["per"], ["each"], ["every"], ["/"], ["out", "of", "the"]):
        if words[1 : 1 + len(joins)] == joins and words[1 + len(joins) :][:1] == ["week"]:
            return items[i].number or 0.0, 3 + len(joins)
    if words[1:2] == ["weekly"]:
        return items[i].number or 0.0, 3
    return 0.0, 0


def _counts(items: list[Item], i: int) -> bool:
    """Whether item i, before "a day", is a number or a unit: "10 mg a day", "two a day"."""
    return items[i].number is not None or UNITS.get(items[i].word, "time") not in (*DAYS, "time")


def _often(times_a_day: float, num_items: int, most: float = 0.0) -> Amount:
    """most: times a day at most, of a range."""
    times = sorted((round(times_a_day, 4), round(most or times_a_day, 4)))
    return Amount("frequency", times[0], times[1], "/day", num_items)


def _times(items: list[Item], i: int) -> tuple[float, float, int]:
    """(times, at most, items) of "twice", "3x" and "once or twice"; all 0 where none are said."""
    low, end = _TIMES.get(items[i].word, items[i].number), i + 1
    if not low:
        return 0.0, 0.0, 0
    most = low
    joined = end + (items[end].word in JOINS[:3])
    more = _TIMES.get(items[joined].word, items[joined].number)
    next_one = more == low + 1 and items[joined].gap in ("", ",")  # "five, six times"
    if more and low < more and (next_one or items[joined].gap == items[end].gap == ""):
        most, end = more, joined + 1
    if items[end].word in ("time", "times", "x") and together(items, end - 1, end):
        end += 1
    elif items[end - 1].number is not None:
        return 0.0, 0.0, 0
    return low, most, end - i


def _per(items: list[Item], i: int, times: float, count: int, most: float = 0.0) -> Amount | None:
    """The frequency of so many times per what stands at item i; count: items before it."""
    start = i
    if items[i].word in ("a", "per", "each", "every", "in", "the", "/", "an", "during"):
        i += 1 + ((items[i].word, items[i + 1].word) in (("in", "a"), ("during", "the")))
    if not together(items, start - 1, i):
        return None
    every_other = 1.0
    if items[i].word == "other":
        every_other, i = 2.0, i + 1
    elif items[i].number and items[i + 1].word in UNITS:
        every_other, i = items[i].number or 1.0, i + 1
    period = _PERIODS.get(UNITS.get(items[i].word, items[i].word))
    if period is None:
        return None
    days = DAYS[period] * every_other
    return _often(times / days, count + i + 1 - start, most / days)


def _every(items: list[Item], i: int) -> Amount | None:
    """ "every day", "every other day", "every 8 hours", "every 4 to 6 hours", "q 8 h"."""
    following = items[i + 1]
    if following.word in ("other", "second") and items[i + 2].word in _PERIODS | UNITS:
        period = _PERIODS.get(UNITS.get(items[i + 2].word, items[i + 2].word))
        return _often(0.5 / DAYS[period], 3) if period else None
    if following.number:
        low = high = following.number
        end = i + 2
        if items[end].number and items[end].word == "":
            high, end = items[end].number or high, end + 1
        elif items[end].word in JOINS and items[end + 1].number:
            high, end = items[end + 1].number or high, end + 2
        period = _PERIODS.get(UNITS.get(items[end].word, items[end].word))
        period = "hour" if items[end].word == "h" else period
        if period is None or not low or not high:
            return None
        days = DAYS[period]
        often = sorted((round(1 / (low * days), 4), round(1 / (high * days), 4)))
        return Amount("frequency", often[0], often[1], "/day", end + 1 - i)
    if following.word == "couple":
        unit = i + 2 + (items[i + 2].word == "of")
        period = _PERIODS.get(UNITS.get(items[unit].word, ""))
        return _often(0.5 / DAYS[period], unit + 1 - i) if period else None
    single = following.word if items[i].word != "q" else ""
    period = _PERIODS.get(single)
    if period is None:
        return None
    return _often(1 / DAYS[period], 2)
