"""Finds the facts of a text that can be compared with another text without understanding either.

A fact is a number with its unit (dose, vital sign, age, duration), a frequency, a date, a drug or a
side of the body. `Statements` tells which facts of a note its dialogue supports, and the reverse.

Only what is stated is checked, not whether it is right: a dose that moved to another drug of the
same visit passes, and so does "denies" in the place of "reports".
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .drugs import generic_name
from .numerals import Item, parse_items

_ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"""
ORDINALS = {word: i for i, word in enumerate(_ORDINALS.split(), 1)} | {"thirtieth": 30}
_MONTHS = """january february march april may june july august september october november
    december"""
MONTHS = _MONTHS.split()
_UNITS = """mg=milligram,milligrams,mgs mcg=microgram,micrograms,ug g=gram,grams,gm
    kg=kilogram,kilograms,kilo,kilos ml=milliliter,milliliters,millilitre,cc,ccs,mls
    l=liter,liters,litre,litres unit=units,iu %=percent meq= mmhg= cm=centimeter,centimeters
    mm=millimeter,millimeters m=meter,meters mile=miles inch=inches foot=feet,ft
    pound=pounds,lb,lbs ounce=ounces,oz calorie=calories degree=degrees,c,f,celsius,fahrenheit,°
    year=years,yr,yrs,yo month=months,mo week=weeks,wk,wks day=days hour=hours,hr,hrs
    minute=minutes,min,mins second=seconds tablet=tablets,tab,tabs,pill,pills capsule=capsules
    puff=puffs drop=drops spray=sprays pack=packs,ppd cigarette=cigarettes drink=drinks,beverages
    beer=beers glass=glasses cup=cups time=times"""


def _units_by_form(table: str) -> dict[str, str]:
    """{every form of a unit, itself included: the unit} of "unit=form,form" entries."""
    units: dict[str, str] = {}
    for entry in table.split():
        unit, forms = entry.split("=")
        units |= dict.fromkeys([unit, *filter(None, forms.split(","))], unit)
    return units


UNITS = _units_by_form(_UNITS)
PERIODS = {unit: unit for unit in ("hour", "day", "week", "month", "year")}
PERIODS |= {"daily": "day", "weekly": "week", "monthly": "month"}
PERIODS |= dict.fromkeys(("nightly", "morning", "evening", "night", "bedtime"), "day")
TIMES = {"once": 1, "twice": 2, "thrice": 3}
TIMES_A_DAY = {"bid": 2, "tid": 3, "qid": 4, "qd": 1, "qhs": 1}
# "a week" is 1 week, and "half a tablet" 0.5 tablets.
AFTER_ARTICLE = (
    *("hour", "week", "month", "year"),
    *("pack", "glass", "beer", "drink", "tablet", "capsule", "puff"),
)
_BODY_PARTS = """abdomen ankle arm armpit axilla back breast buttock calf cheek chest ear elbow eye
    face finger flank foot forearm forehead groin hand head heel hemisphere hip jaw kidney knee leg
    limb lobe lung mandible neck nostril ovary quadrant rib shoulder shin sinus side temple testicle
    thigh throat thumb toe tonsil wrist ventricle"""
BODY_PARTS = {form: part for part in _BODY_PARTS.split() for form in (part, f"{part}s")}
BODY_PARTS |= {"feet": "foot", "calves": "calf", "sided": "side", "ovaries": "ovary"}
BODY_PARTS |= {"extremity": "limb", "extremities": "limb"}
SIDES = {"left": "left", "right": "right"}
SIDES |= dict.fromkeys(("both", "bilateral", "bilaterally"), "both")


class Fact(NamedTuple):
    kind: str  # number, often (a frequency), date, drug or side
    value: str  # normalised, such as "500 mg", "2/day", "m7 d29 y2008" or "left knee"
    start: int  # the fact is text[start:end]
    end: int


class Match(NamedTuple):
    """A fact that begins at some item."""

    kind: str
    value: str
    num_items: int  # items that the fact spans


MAX_DATE_ITEMS = 5  # of "7/29/2008"
_END = Item(
    "", None, 0, 0
)  # stands behind the last item of a text, so that matchers can look ahead
_PADDING = [_END] * MAX_DATE_ITEMS


def extract_facts(text: str) -> list[Fact]:
    """All facts of a text, in its order.

    A bare integer below 10 is no fact: in speech most are "one of them" or belong to a list.
    """
    return _facts_of(text, parse_items(text))


def _facts_of(text: str, items: list[Item]) -> list[Fact]:
    """The facts of a text. items: of `parse_items`."""
    num_items = len(items)
    items = items + _PADDING
    found: list[Fact] = []
    i = 0
    while i < num_items:
        match = _match_at(text, items, i)
        if match is None:
            i += 1
            continue
        last = min(i + match.num_items, num_items) - 1
        found.append(Fact(match.kind, match.value, items[i].start, items[last].end))
        i += match.num_items
    return found


def _match_at(text: str, items: list[Item], i: int) -> Match | None:
    """The fact that begins at item i, by the first matcher that finds one."""
    for matcher in MATCHERS:
        match = matcher(text, items, i)
        if match:
            return match
    return None


def _match_date(text: str, items: list[Item], i: int) -> Match | None:
    """A date as "m7 d29 y2008", without the parts that are not stated.

    A year alone is a date; a month alone is one only after a word such as "in".
    """
    window = items[i : i + MAX_DATE_ITEMS] + _PADDING
    previous = items[i - 1].word if i else ""
    return (
        _match_numeric_date(window)
        or _match_named_month(window, previous)
        or _match_month_and_year(window)
        or _match_year(window)
    )


def _match_numeric_date(window: list[Item]) -> Match | None:
    """A date such as "7/29/2008" or "7/29/08"."""
    month, slash, day, second_slash, year = window[:5]
    if slash.word != "/" or second_slash.word != "/":
        return None
    if month.number is None or day.number is None or year.number is None:
        return None
    if month.number > 12 or day.number > 31:
        return None
    value = f"m{int(month.number)} d{int(day.number)} y{_full_year(int(year.number))}"
    return Match("date", value, 5)


def _full_year(year: int) -> int:
    """2008 of 8, 1998 of 98."""
    if year < 50:
        return year + 2000
    return year + 1900 if year < 100 else year


def _match_named_month(window: list[Item], previous: str) -> Match | None:
    """A date such as "July 29th 2008", "July of 2008", "July twenty ninth" or "in July"."""
    if window[0].word not in MONTHS:
        return None
    value = f"m{MONTHS.index(window[0].word) + 1}"
    count = 1
    day = _day_of_month(window)
    if day is not None:
        day_number, num_items = day
        value = f"{value} d{day_number}"
        count += num_items
        if window[count].word in ("st", "nd", "rd", "th"):
            count += 1
    if window[count].word == "of":
        count += 1
    year = _year(window[count])
    if year is not None:
        return Match("date", f"{value} y{year}", count + 1)
    after_preposition = previous in ("in", "since", "of", "last", "this", "until", "by")
    if day is None and not after_preposition:  # "she may come"
        return None
    return Match("date", value, count)


def _day_of_month(window: list[Item]) -> tuple[int, int] | None:
    """(day, its items) after a month's name: "29", "third" or "twenty ninth"."""
    day, following = window[1:3]
    if day.number is None or day.number not in range(1, 32) or following.word in UNITS:
        ordinal = ORDINALS.get(day.word)
        return None if ordinal is None else (ordinal, 1)
    ones = ORDINALS.get(following.word, 0)
    if day.number in (20, 30) and 0 < ones < 10:
        return int(day.number) + ones, 2
    return int(day.number), 1


def _year(item: Item) -> int | None:
    if item.number is None or item.number not in range(1900, 2100):
        return None
    return int(item.number)


def _match_month_and_year(window: list[Item]) -> Match | None:
    """A date such as "7/2008"."""
    month, slash = window[:2]
    year = _year(window[2])
    if month.number is None or month.number not in range(1, 13):
        return None
    if slash.word != "/" or year is None:
        return None
    return Match("date", f"m{int(month.number)} y{year}", 3)


def _match_year(window: list[Item]) -> Match | None:
    """A date such as "2008", but neither "2000 mg" nor the first number of "2000/1"."""
    year = _year(window[0])
    following = window[1].word
    if year is None or following in UNITS or following == "/":
        return None
    return Match("date", f"y{year}", 1)


def _match_times_per_period(text: str, items: list[Item], i: int) -> Match | None:
    """A frequency such as "twice a day", "three times daily" or "once every week"."""
    item = items[i]
    if item.word in TIMES:
        times: float = TIMES[item.word]
        end = i + 1
    elif item.number and items[i + 1].word in ("time", "times"):
        times = item.number
        end = i + 2
    else:
        return None
    if items[end].word in ("a", "per", "each", "every", "in", "the"):
        end += 1
    word = items[end].word
    period = PERIODS.get(UNITS.get(word, word))
    if period is None:
        return None
    return Match("often", f"{_format(times)}/{period}", end + 1 - i)


def _match_frequency(text: str, items: list[Item], i: int) -> Match | None:
    """A frequency such as "t.i.d.", "daily", "every morning" or "at bedtime"."""
    word = items[i].word
    following = items[i + 1].word
    if word in TIMES_A_DAY:
        return Match("often", f"{TIMES_A_DAY[word]}/day", 1)
    if word in ("daily", "nightly", "weekly", "monthly"):
        return Match("often", f"1/{PERIODS[word]}", 1)
    at_bedtime = (word, following) == ("at", "bedtime")
    if (word == "every" or at_bedtime) and following in PERIODS:
        return Match("often", f"1/{PERIODS[following]}", 2)
    return None


def _match_number(text: str, items: list[Item], i: int) -> Match | None:
    """A number such as "120/80", "eight out of ten", "500 milligrams" or "98.6"."""
    number = items[i].number
    if number is None:
        return None
    value = _format(number)
    following = items[i + 1].word
    separators = 0  # items between the number and what it is over
    if following in ("/", "over"):
        separators = 1
    elif (following, items[i + 2].word) == ("out", "of"):
        separators = 2
    below = items[i + 1 + separators].number if separators else None
    if below is not None:
        return Match("number", f"{value}/{_format(below)}", 2 + separators)
    unit = UNITS.get(following)
    if unit and not re.search(r"[,.;:\n]", text[items[i].end : items[i + 1].start]):
        return Match("number", f"{value} {unit}", 2)
    if number < 10 and number == int(number):
        return None
    return Match("number", value, 1)


def _match_long_number(text: str, items: list[Item], i: int) -> Match | None:
    """A number of more digits than a float keeps, digit by digit; its unit is not looked at."""
    word = items[i].word
    if items[i].number is not None or not word.replace(".", "").isdecimal():
        return None
    return Match("number", word, 1)


def _match_article(text: str, items: list[Item], i: int) -> Match | None:
    """A number such as "a year", "half a tablet" or "a pack and a half"."""
    unit = items[i + 1].word
    if items[i].word not in ("a", "an") or unit not in AFTER_ARTICLE:
        return None
    if [item.word for item in items[i + 2 : i + 5]] == ["and", "a", "half"]:
        return Match("number", f"1.5 {unit}", 5)
    if i and items[i - 1].word == "half":
        return Match("number", f"0.5 {unit}", 2)
    return Match("number", f"1 {unit}", 2)


def _match_drug(text: str, items: list[Item], i: int) -> Match | None:
    """A drug, by its generic name; or a vitamin with its letter, such as "vitamin d"."""
    word = items[i].word
    drug = generic_name(word)
    if drug is None:
        return None
    if word == "vitamin":
        letter = items[i + 1].word
        return Match("drug", f"vitamin {letter}", 2 if len(letter) < 4 else 1)
    return Match("drug", drug, 1)


def _match_side(text: str, items: list[Item], i: int) -> Match | None:
    """A side such as "left knee", "both feet", "on the right" or "bilaterally".

    Not "all right", "I left" or "both of us": a side needs a body part after it within the
    sentence, or "on the" or the like before it.
    """
    word = items[i].word
    if word not in SIDES:
        return None
    part = ""
    for item in items[i + 1 : i + 4]:
        same_sentence = not re.search(r"[.?!\n]", text[items[i].end : item.start])
        if same_sentence and item.word in BODY_PARTS:
            part = BODY_PARTS[item.word]
            break
    after_preposition = (
        i > 1
        and items[i - 1].word in ("the", "my", "your", "his", "her")
        and items[i - 2].word in ("on", "to", "in")
    )
    if not part and not after_preposition and not word.startswith("bi"):
        return None
    return Match("side", f"{SIDES[word]} {part}".strip().removesuffix(" side"), 1)


Matcher = Callable[[str, list[Item], int], Match | None]  # of (text, its padded items, an index)
MATCHERS: tuple[Matcher, ...] = (
    _match_date,
    _match_times_per_period,
    _match_frequency,
    _match_number,
    _match_long_number,
    _match_article,
    _match_drug,
    _match_side,
)


def _format(number: float) -> str:
    """At most three decimals, without trailing zeros."""
    return f"{number:.3f}".rstrip("0").rstrip(".")


def format_numbers(items: Iterable[Item]) -> set[str]:
    """The numbers of the items that are one."""
    return {_format(item.number) for item in items if item.number is not None}


class Statements:
    """What a text states. `supports` tells whether it states a fact of another text."""

    def __init__(self, text: str) -> None:
        items = parse_items(text)
        self.facts = _facts_of(text, items)
        self.values = {(fact.kind, fact.value) for fact in self.facts}
        numbers = [item for item in items if item.number is not None]
        self.numbers = format_numbers(numbers)
        self.bare_numbers = format_numbers(self._bare(numbers))
        # Every date, also without some of its parts.
        self.dates = {
            frozenset(parts)
            for kind, value in self.values
            if kind == "date"
            for size in (1, 2, 3)
            for parts in itertools.combinations(value.split(), size)
        }
        self.sides: dict[str, set[str]] = {}  # by body part, "" where none is stated
        for kind, value in self.values:
            if kind == "side":
                side, _, part = value.partition(" ")
                self.sides.setdefault(part, set()).add(side)

    def _bare(self, numbers: list[Item]) -> Iterator[Item]:
        """The numbers without a meaning of their own: not part of a dose, a date, an age."""
        measured = iter(f for f in self.facts if not f.value.replace(".", "").isdigit())
        fact = next(measured, None)
        for item in numbers:
            while fact and fact.end <= item.start:
                fact = next(measured, None)
            if not fact or item.start < fact.start:
                yield item

    def supports(self, fact: Fact) -> bool:
        """Whether the text states the fact, too.

        A number with a unit is supported by the same one without any ("I take 500"), not by one
        with another unit; a date by one that states at least as much; "left knee" by a left without
        a body part, and by "both knees".
        """
        if (fact.kind, fact.value) in self.values:
            return True
        if fact.kind == "number":
            return self._supports_number(fact.value)
        if fact.kind == "date":
            return self._supports_date(fact.value)
        if fact.kind == "side":
            return self._supports_side(fact.value)
        return False

    def _supports_number(self, value: str) -> bool:
        if "/" in value.removesuffix("/10"):
            return False
        # Speakers leave out "out of ten" as they leave out units.
        number, _, unit = value.replace("/", " ").partition(" ")
        return number in (self.bare_numbers if unit else self.numbers)

    def _supports_date(self, value: str) -> bool:
        if frozenset(value.split()) in self.dates:
            return True
        return value[0] == "y" and value[1:] in self.numbers

    def _supports_side(self, value: str) -> bool:
        side, _, part = value.partition(" ")
        if part:
            stated = self.sides.get("", set()) | self.sides.get(part, set())
        else:
            stated = set().union(*self.sides.values())
        return (
            side in stated or "both" in stated or (side == "both" and {"left", "right"} <= stated)
        )


def distinct(found: list[Fact]) -> list[Fact]:
    """The first of each fact that a text states, in its order."""
    first: dict[tuple[str, str], Fact] = {}
    for fact in found:
        first.setdefault((fact.kind, fact.value), fact)
    return list(first.values())
