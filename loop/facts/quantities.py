"""Amounts of a text: doses, durations, ages, measurements, and how often something happens.

An amount is a range of numbers with a unit. Durations are in days, so that "a fortnight" and
"2 weeks" are one; frequencies are times a day, so that "every 8 hours" is "t.i.d.".
"""

import re
from typing import NamedTuple

from .numerals import Item

_UNITS = """
    mg=milligram,milligrams,mgs mcg=microgram,micrograms,ug,µg,μg,mcgs g=gram,grams,gm,gms
    kg=kilogram,kilograms,kilo,kilos ml=milliliter,milliliters,millilitre,millilitres,cc,ccs,mls
    l=liter,liters,litre,litres unit=units,iu,ius %=percent meq=milliequivalent,milliequivalents
    mmhg= cm=centimeter,centimeters,centimetre,centimetres mm=millimeter,millimeters,millimetres
    m=meter,meters,metre,metres mile=miles inch=inches foot=feet,ft pound=pounds,lb,lbs
    ounce=ounces,oz calorie=calories degree=degrees,c,f,celsius,fahrenheit,° year=years,yr,yrs
    month=months,mo,mos week=weeks,wk,wks fortnight=fortnights day=days hour=hours,hr,hrs
    decade=decades minute=minutes,min,mins second=seconds,sec,secs
    tablet=tablets,tab,tabs,pill,pills
    capsule=capsules,cap,caps puff=puffs,inhalation,inhalations drop=drops,gtt,gtts
    spray=sprays patch=patches teaspoon=teaspoons,tsp tablespoon=tablespoons,tbsp
    pack=packs,ppd cigarette=cigarettes drink=drinks,beverages beer=beers glass=glasses cup=cups
    time=times,x bpm= mmol= yo=
"""


def _units_by_form(table: str) -> dict[str, str]:
    """{every form of a unit, itself included: the unit} of "unit=form,form" entries."""
    units: dict[str, str] = {}
    for entry in table.split():
        unit, forms = entry.split("=")
        units |= dict.fromkeys([unit, *filter(None, forms.split(","))], unit)
    return units


UNITS = _units_by_form(_UNITS)
DAYS = {"minute": 1 / 1440, "hour": 1 / 24, "day": 1, "week": 7, "fortnight": 14}
DAYS |= {"second": 1 / 86400, "month": 30, "year": 360, "decade": 3600}  # 12 months are a year
DOSES = frozenset("mg mcg g ml unit meq tablet capsule puff drop spray patch teaspoon".split())
DOSES |= {"tablespoon", "l"}
TO_MG = {"mcg": 0.001, "mg": 1.0, "g": 1000.0}
_CONCENTRATED = frozenset("mg mcg g ml l mmol meq unit".split())
_WHOLES = {form: form for form in ("dl", "l", "ml", "min", "hr", "kg")}  # of "mg/dL"
_WHOLES |= dict.fromkeys(("deciliter", "decilitre"), "dl") | {"liter": "l", "milliliter": "ml"}
_WHOLES |= {"minute": "min", "hour": "hr", "kilogram": "kg", "kilo": "kg"}
# Units that "a" and "half a" may stand before, as in "a week" and "half a tablet".
_AFTER_ARTICLE = frozenset(
    """hour day week fortnight month year decade pack glass beer tablet capsule puff
    teaspoon""".split()
)
# "a couple of", "a few", and where they lie at most
_VAGUE = {"couple": (2.0, 2.0), "few": (2.0, 4.0), "several": (3.0, 9.0), "dozen": (12.0, 12.0)}
_PARTS_OF_ONE = {"half": 0.5, "quarter": 0.25, "third": 1 / 3}
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
_EVERY = re.compile(r"q(\d{1,2})(h|hr|hrs|hours|d|days|wk|w|weeks|mo|m)")  # q8h
_EVERY_UNIT = {"h": 24.0, "d": 1.0, "w": 1 / 7, "m": 1 / 30}
_AT_NIGHT = frozenset("qhs hs qpm nocte nightly night bedtime bed evening".split())
_IN_THE_MORNING = frozenset("qam mane morning".split())
_WEEKDAYS = frozenset(
    "mondays tuesdays wednesdays thursdays fridays saturdays sundays weekends".split()
)
_JOINS = ("to", "or", "through", "and")  # of a range


class Amount(NamedTuple):
    """An amount that begins at some item. low equals high where it is no range."""

    kind: str  # dose, duration, age, frequency, ratio (120/80) or number
    low: float
    high: float
    unit: str  # "" where there is none, "day" of a duration, "/day" of a frequency
    num_items: int
    is_vague: bool = False  # of "a few days"
    at: str = ""  # the time of day of a frequency: "morning", "night", or none


def amount_at(text: str, items: list[Item], i: int) -> Amount | None:
    """The amount that begins at item i; None where none does.

    items: with some empty ones behind the last, so that it can look ahead.
    """
    often = _frequency(text, items, i)
    if often:
        words = {item.word for item in items[i : i + often.num_items]}
        at = "night" if words & _AT_NIGHT else "morning" if words & _IN_THE_MORNING else ""
        return often._replace(at=at) if at else often
    return _ratio(items, i) or _quantity(text, items, i)


def _together(items: list[Item], first: int, last: int) -> bool:
    """Whether no sentence and no clause ends between two items."""
    return all(items[k].gap in ("", "(", ")") for k in range(first + 1, last + 1))


def _frequency(text: str, items: list[Item], i: int) -> Amount | None:
    word, following = items[i].word, items[i + 1].word
    if word in _LATIN:
        return _often(_LATIN[word], 1)
    match = _EVERY.fullmatch(word) if word[:1] == "q" else None
    if match and int(match[1]):
        return _often(_EVERY_UNIT[match[2][0]] / int(match[1]), 1)
    if re.fullmatch(r"q[1-9]\d?", word):
        return _every_so_many(items, i)
    if word in ("every", "each", "q") and _together(items, i, i + 1):
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
    weekdays, count = _weekdays(items, i) if word == "on" else (0, 0)
    if weekdays:
        return _often(weekdays / 7, count + 1)
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
    joined = end + (items[end].word in _JOINS[:2])
    high = items[joined].number
    end = joined + 1 if high else end
    unit = "hour" if items[end].word == "h" else UNITS.get(items[end].word, "")
    if unit not in _PERIODS or not _together(items, i, end):
        return None
    return _often(1 / (low * DAYS[unit]), end + 1 - i, 1 / ((high or low) * DAYS[unit]))


def _weekdays(items: list[Item], i: int) -> tuple[int, int]:
    """(days, items) of "Mondays, Wednesdays and Fridays" behind item i."""
    days, end = 0, i + 1
    while items[end].word in _WEEKDAYS or (days and items[end].word == "and"):
        days, end = days + (items[end].word != "and"), end + 1
    return days, end - i - 1


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
    joined = end + (items[end].word in _JOINS[:3])
    more = _TIMES.get(items[joined].word, items[joined].number)
    if more and low < more and items[joined].gap == items[end].gap == "":
        most, end = more, joined + 1
    if items[end].word in ("time", "times", "x") and _together(items, i, end):
        end += 1
    elif items[end - 1].number is not None:
        return 0.0, 0.0, 0
    return low, most, end - i


def _per(items: list[Item], i: int, times: float, count: int, most: float = 0.0) -> Amount | None:
    """The frequency of so many times per what stands at item i; count: items before it."""
    start = i
    if items[i].word in ("a", "per", "each", "every", "in", "the", "/", "an", "during"):
        i += 1 + ((items[i].word, items[i + 1].word) in (("in", "a"), ("during", "the")))
    if not _together(items, start - 1, i):
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
        elif items[end].word in _JOINS and items[end + 1].number:
            high, end = items[end + 1].number or high, end + 2
        period = _PERIODS.get(UNITS.get(items[end].word, items[end].word))
        period = "hour" if items[end].word == "h" else period
        if period is None or not low or not high:
            return None
        days = DAYS[period]
        often = sorted((round(1 / (low * days), 4), round(1 / (high * days), 4)))
        return Amount("frequency", often[0], often[1], "/day", end + 1 - i)
    single = following.word if items[i].word != "q" else ""
    period = _PERIODS.get(single)
    if period is None:
        return None
    return _often(1 / DAYS[period], 2)


def _ratio(items: list[Item], i: int) -> Amount | None:
    """ "120/80", "one twenty over eighty" and "eight out of ten"."""
    above = items[i].number
    if above is None:
        return None
    scale = _range_of_ten(items, i)
    if scale:
        return scale
    separators = 0
    if items[i + 1].word in ("/", "over"):
        separators = 1
    elif (items[i + 1].word, items[i + 2].word) == ("out", "of"):
        separators = 2
    below = items[i + 1 + separators].number if separators else None
    if below is None:
        return None
    unit = UNITS.get(items[i + 2 + separators].word, "")
    if above in (1, 2, 3) and below in (2, 3, 4, 8) and above < below and unit:
        return Amount(_kind(unit), above / below, above / below, unit, 3 + separators)
    return Amount("ratio", above, below, "", 2 + separators)


def _range_of_ten(items: list[Item], i: int) -> Amount | None:
    """ "7-8/10", "seven to eight out of ten"."""
    above, end = items[i].number, i + 1 + (items[i + 1].word in _JOINS[:3])
    more, joins = items[end].number, [item.word for item in items[end + 1 : end + 3]]
    ten = end + 1 + (1 if joins[:1] == ["/"] else 2)
    says = joins[:1] == ["/"] or joins == ["out", "of"]
    if above is None or more is None or not says or items[ten].number != 10 or above >= more:
        return None
    return Amount("number", above, more, "/10", ten + 1 - i) if more <= 10 else None


def _quantity(text: str, items: list[Item], i: int) -> Amount | None:
    low, high, end = _numbers(text, items, i)
    if not end:
        return None
    unit, used = _unit(text, items, end)
    if not unit:
        if items[i].number is None:
            return None
        kind = "age" if _says_age(items, i) else "number"
        if high != low and kind == "number" and items[end - 1].number is None:
            return None
        days = DAYS["year"] if kind == "age" else 1.0
        return Amount(kind, low * days, high * days, "day" if kind == "age" else "", end - i)
    end += used
    if low == high == 1 and _or_two(items, end):
        low, high, end = 1.0, items[end + 1].number or 2.0, end + 2
    if [item.word for item in items[end : end + 3]] == ["and", "a", "half"]:
        low, high, end = low + 0.5, high + 0.5, end + 3
    if unit in DAYS or unit == "yo":
        days = DAYS["year" if unit == "yo" else unit]
        old = unit == "yo" or items[end].word == "old" or _says_age(items, i)
        old = old or (items[end].word, items[end + 1].word) == ("of", "age")
        kind, is_vague = "age" if old else "duration", items[i].number is None and low < high
        return Amount(kind, low * days, high * days, "day", end - i, is_vague)
    return Amount(_kind(unit), low, high, unit, end - i)


def _or_two(items: list[Item], i: int) -> bool:
    """Whether item i goes on "a beer" or "one day" by "or two", without another unit."""
    more = items[i + 1].number
    if items[i].word not in ("or", "to") or more is None or not 1 < more < 10:
        return False
    return _together(items, i, i + 1) and items[i + 2].word not in UNITS


def _kind(unit: str) -> str:
    if unit in DOSES:
        return "dose"
    return "duration" if unit in DAYS else "number"


def _numbers(text: str, items: list[Item], i: int) -> tuple[float, float, int]:
    """(low, high, the item behind) of a number, range or "a couple of"; the item is 0 for none."""
    number = items[i].number
    if number is None:
        return _vague(items, i)
    if number in (1, 3) and items[i + 1].word in ("quarter", "quarters", "half"):
        part = number * _PARTS_OF_ONE[items[i + 1].word.rstrip("s")]
        end = i + 2 + (items[i + 2].word == "of")
        end += items[end].word in ("a", "an")
        if items[end].word in UNITS and _together(items, i, end):
            return part, part, end
    if number < 1 or (number == 2 and items[i + 1].word == "thirds"):  # "\u00be of a tablet"
        end = i + 1 + (number == 2)
        part = number if number < 1 else 2 / 3
        if items[end].word == "of" and items[end + 1].word in ("a", "an"):
            return part, part, end + 2
    other, end = None, i + 1
    if i and items[i - 1].word == "from":  # what changes is no range
        return number, number, end
    if items[end].number is not None and items[end].gap == "":
        if text[items[i].end : items[end].start].strip() in ("-", "\u2013", "\u2014"):
            other, end = items[end].number, end + 1
    elif items[end].word in _JOINS and items[end + 1].number is not None:
        is_and = items[end].word == "and" and items[i - 1].word != "between"
        if not is_and and _together(items, i, end + 1):
            other, end = items[end + 1].number, end + 2
    elif items[end].word in UNITS and items[end + 1].word in ("to", "or"):
        same = UNITS.get(items[end + 3].word) == UNITS[items[end].word]
        if same and items[end + 2].number is not None and _together(items, i, end + 3):
            other, end = items[end + 2].number, end + 3
    if other is not None and number < other:
        return number, other, end
    if other is not None:
        return number, number, i + 1
    return number, number, i + 1


def _vague(items: list[Item], i: int) -> tuple[float, float, int]:
    """As `_numbers`, of "a couple of years", "a few days", "a week" and "half a tablet"."""
    word, following = items[i].word, items[i + 1].word
    if word in ("a", "an", "the", "past", "last") and following in _VAGUE:
        low, high = _VAGUE[following]
        return low, high, i + 2 + (items[i + 2].word == "of")
    if word in _VAGUE:
        low, high = _VAGUE[word]
        return low, high, i + 1 + (following == "of")
    if word in _PARTS_OF_ONE or (word == "third" and following == "of"):
        end = i + 1 + (following == "of")
        end += items[end].word in ("a", "an")
        if items[end].word in UNITS:
            return _PARTS_OF_ONE[word], _PARTS_OF_ONE[word], end
    if word in ("a", "an") and UNITS.get(following) in _AFTER_ARTICLE:
        return 1.0, 1.0, i + 1
    more = [item.word for item in items[i + 2 : i + 5]]
    if word in ("last", "past") and UNITS.get(following) and more == ["and", "a", "half"]:
        return 1.0, 1.0, i + 1
    return 0.0, 0.0, 0


def _unit(text: str, items: list[Item], i: int) -> tuple[str, int]:
    """(the unit that item i is, its items); ("", 0) where it is none."""
    word = items[i].word
    if items[i].gap not in ("", "(", ")"):
        return "", 0
    spelled = word + items[i + 1].word
    if word in ("m", "k", "c") and spelled in ("mg", "kg", "ml", "cc", "cm", "mm"):
        return UNITS[spelled], 2  # as transcripts spell "m g"
    if spelled + items[i + 2].word == "mcg" and word == "m":
        return "mcg", 3
    if word == "y" and items[i + 1].word == "/" and items[i + 2].word == "o":
        return "yo", 3
    unit = UNITS.get(word, "")
    if unit == "time" or (word == "second" and items[i - 1].number == 1):
        return "", 0
    if word == "pack" and items[i + 1].word in ("year", "years"):
        return "packyear", 2
    if items[i + 1].word in ("/", "per") and unit in _CONCENTRATED:
        whole = _WHOLES.get(items[i + 2].word)
        if whole:
            return f"{unit}/{whole}", 3
    return unit, 1 if unit else 0


def _says_age(items: list[Item], i: int) -> bool:
    before = items[i - 1].word if i else ""
    if before in ("age", "aged", "ages", "turned"):
        return True
    return before in ("of", "is", "was", "at") and i > 1 and items[i - 2].word == "age"


def describe(amount: Amount) -> str:
    """ "40 mg", "2-10 mg", "3 week", "2/day", "120/80": an amount as a report shows it."""
    if amount.kind == "ratio":
        return f"{_format(amount.low)}/{_format(amount.high)}"
    if amount.at:
        when = "at night" if amount.at == "night" else "in the morning"
        return f"{describe(amount._replace(at=''))} {when}"
    if amount.unit == "/day":
        if amount.low >= 0.99 or not amount.low:
            return f"{_span(amount.low, amount.high)}/day"
        return f"every {_span(round(1 / amount.high, 2), round(1 / amount.low, 2))} days"
    if amount.unit == "day":
        unit = "day"
        for name in ("week", "month", "year"):
            if amount.low >= DAYS[name] and amount.low % DAYS[name] == 0:
                unit = name
        days = DAYS[unit]
        return f"{_span(amount.low / days, amount.high / days)} {unit}"
    return f"{_span(amount.low, amount.high)} {amount.unit}".rstrip()


def _span(low: float, high: float) -> str:
    return _format(low) if low == high else f"{_format(low)}-{_format(high)}"


def _format(number: float) -> str:
    """At most three decimals, without trailing zeros."""
    return f"{number:.3f}".rstrip("0").rstrip(".")
