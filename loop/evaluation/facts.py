"""Facts of a text that can be held against another text without understanding either: numbers with their units (doses, vital signs, ages,
durations), how often, dates, drugs and sides. `Said` tells which facts of a note its dialogue supports, and the other way round.

It sees what is stated, not whether it is right: a dose moved to another drug of the same visit, or "denies" in the place of "reports",
passes."""

import math
import re
from typing import NamedTuple

from .drugs import drug_of
from .numerals import Item, items_of

_WORDS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth"
ORDINALS = {w: i for i, w in enumerate(f"{_WORDS} eighteenth nineteenth twentieth".split(), 1)} | {
    "thirtieth": 30
}
MONTHS = (
    "january february march april may june july august september october november december".split()
)
UNITS = {
    form: unit
    for entry in """mg=milligram,milligrams,mgs mcg=microgram,micrograms,ug g=gram,grams,gm kg=kilogram,kilograms,kilo,kilos
    ml=milliliter,milliliters,millilitre,cc,ccs,mls l=liter,liters,litre,litres unit=units,iu %=percent meq= mmhg= cm=centimeter,centimeters
    mm=millimeter,millimeters m=meter,meters mile=miles inch=inches foot=feet,ft pound=pounds,lb,lbs ounce=ounces,oz calorie=calories
    degree=degrees,c,f,celsius,fahrenheit,° year=years,yr,yrs,yo month=months,mo week=weeks,wk,wks day=days hour=hours,hr,hrs
    minute=minutes,min,mins second=seconds tablet=tablets,tab,tabs,pill,pills capsule=capsules puff=puffs drop=drops spray=sprays
    pack=packs,ppd cigarette=cigarettes drink=drinks,beverages beer=beers glass=glasses cup=cups time=times""".split()
    for unit, forms in [entry.split("=")]
    for form in [unit, *filter(None, forms.split(","))]
}
PERIODS = {unit: unit for unit in ("hour", "day", "week", "month", "year")} | {
    "daily": "day",
    "weekly": "week",
    "monthly": "month",
}
PERIODS |= dict.fromkeys(("nightly", "morning", "evening", "night", "bedtime"), "day")
OFTEN = {"bid": 2, "tid": 3, "qid": 4, "qd": 1, "qhs": 1}  # times a day
WHOLE = (
    "hour",
    "week",
    "month",
    "year",
    "pack",
    "glass",
    "beer",
    "drink",
    "tablet",
    "capsule",
    "puff",
)  # "a week" is 1 week
PARTS = {
    form: part
    for part in """abdomen ankle arm armpit axilla back breast buttock calf cheek chest ear elbow eye face finger flank foot forearm
    forehead groin hand head heel hemisphere hip jaw kidney knee leg limb lobe lung mandible neck nostril ovary quadrant rib shoulder shin sinus
    side temple testicle thigh throat thumb toe tonsil wrist ventricle""".split()
    for form in (part, f"{part}s")
}
PARTS |= {
    "feet": "foot",
    "calves": "calf",
    "sided": "side",
    "ovaries": "ovary",
    "extremity": "limb",
    "extremities": "limb",
}
SIDES = {
    "left": "left",
    "right": "right",
    "both": "both",
    "bilateral": "both",
    "bilaterally": "both",
}


class Fact(NamedTuple):
    kind: str  # number, often, date, drug or side
    value: str  # what is compared
    start: int  # where it stands in the text
    end: int


def _show(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _date(items: list[Item], at: int) -> tuple[str, int] | None:
    """A date such as m7 d29 y2008, of what is said of it, and the item behind it. A year alone is one, a month alone where "in" leads to it."""
    words = [i.word for i in items[at : at + 5]] + [""] * 5
    numbers = [math.nan if i.number is None else i.number for i in items[at : at + 5]] + [
        math.nan
    ] * 5  # nan: in no range

    def day(k: int) -> int | None:  # a number, "29th", "third" or "twenty ninth"
        return (
            int(numbers[k])
            if numbers[k] in range(1, 32) and words[k + 1] not in UNITS
            else ORDINALS.get(words[k])
        )

    def year(k: int) -> bool:
        return numbers[k] in range(1900, 2100)

    if (
        numbers[0] <= 12
        and words[1] == "/"
        and numbers[2] <= 31
        and words[3] == "/"
        and numbers[4] >= 0
    ):
        full = int(numbers[4]) + (2000 if numbers[4] < 50 else 1900 if numbers[4] < 100 else 0)
        return f"m{int(numbers[0])} d{int(numbers[2])} y{full}", 5
    if words[0] in MONTHS:
        found, k = f"m{MONTHS.index(words[0]) + 1}", 1
        if first := day(1):
            tens, k = (
                (
                    numbers[1] in (20, 30)
                    and ORDINALS.get(words[2], 0) < 10
                    and ORDINALS.get(words[2], 0)
                )
                or 0,
                2,
            )
            found, k = f"{found} d{first + tens}", k + bool(tens)
            k += words[k] in ("st", "nd", "rd", "th")
        k += words[k] == "of"
        if year(k):
            return f"{found} y{int(numbers[k])}", k + 1
        return (
            (found, k)
            if " d" in found
            or (at and items[at - 1].word in ("in", "since", "of", "last", "this", "until", "by"))
            else None
        )
    if numbers[0] in range(1, 13) and words[1] == "/" and year(2):
        return f"m{int(numbers[0])} y{int(numbers[2])}", 3
    return (
        (f"y{int(numbers[0])}", 1)
        if year(0) and words[1] not in UNITS and words[1] != "/"
        else None
    )


def facts(text: str) -> list[Fact]:
    """All facts of a text, in its order. A bare whole number below 10 is none: in speech most are "one of them" or a list's."""
    items = items_of(text)
    words, numbers = [i.word for i in items] + [""] * 4, [i.number for i in items] + [None] * 4
    found: list[Fact] = []
    i = 0
    while i < len(items):
        kind, value, taken, word, number = "", "", 1, words[i], numbers[i]
        times = {"once": 1, "twice": 2, "thrice": 3}.get(
            word, number if words[i + 1] in ("time", "times") else None
        )
        behind = (
            i + 1 + (number is not None)
        )  # once a day; 3 times a day, where "x" and "per" will do as well
        behind += words[behind] in ("a", "per", "each", "every", "in", "the")
        if dated := _date(items, i):
            kind, (value, taken) = "date", dated
        elif times and (period := PERIODS.get(UNITS.get(words[behind], words[behind]))):
            kind, value, taken = "often", f"{_show(times)}/{period}", behind + 1 - i
        elif word in OFTEN:
            kind, value = "often", f"{OFTEN[word]}/day"
        elif word in ("daily", "nightly", "weekly", "monthly"):
            kind, value = "often", f"1/{PERIODS[word]}"
        elif (word == "every" or (word, words[i + 1]) == ("at", "bedtime")) and words[
            i + 1
        ] in PERIODS:
            kind, value, taken = "often", f"1/{PERIODS[words[i + 1]]}", 2
        elif number is not None:
            kind, value = "number", _show(number)
            gap = (
                2
                if (words[i + 1], words[i + 2]) == ("out", "of")
                else 1
                if words[i + 1] in ("/", "over")
                else 0
            )
            if gap and (below := numbers[i + 1 + gap]) is not None:
                value, taken = f"{value}/{_show(below)}", 2 + gap
            elif (unit := UNITS.get(words[i + 1])) and not re.search(
                r"[,.;:\n]", text[items[i].end : items[i + 1].start]
            ):
                value, taken = f"{value} {unit}", 2
            elif number < 10 and number == int(number):
                kind = ""
        elif word in ("a", "an") and words[i + 1] in WHOLE:
            half = words[i + 2 : i + 5] == ["and", "a", "half"]
            kind, value, taken = (
                "number",
                f"{1.5 if half else 0.5 if i and words[i - 1] == 'half' else 1} {words[i + 1]}",
                5 if half else 2,
            )
        elif drug := drug_of(word):
            kind, value = "drug", f"vitamin {words[i + 1]}" if word == "vitamin" else drug
            taken += word == "vitamin" and len(words[i + 1]) < 4
        elif word in SIDES:
            near = (
                k.word
                for k in items[i + 1 : i + 4]
                if not re.search(r"[.?!\n]", text[items[i].end : k.start])
            )
            part = next((PARTS[w] for w in near if w in PARTS), "")
            led = (
                i > 1
                and words[i - 1] in ("the", "my", "your", "his", "her")
                and words[i - 2] in ("on", "to", "in")
            )
            if (
                part or led or word.startswith("bi")
            ):  # else it is "all right", "I left", "both of us"
                kind, value = "side", f"{SIDES[word]} {part}".strip().removesuffix(" side")
        if kind:
            found.append(
                Fact(kind, value, items[i].start, items[min(i + taken, len(items)) - 1].end)
            )
        i += taken
    return found


class Statements:
    """What a text says, to be asked whether it supports facts of another one."""

    def __init__(self, text: str) -> None:
        self.facts = facts(text)
        self.values = {(f.kind, f.value) for f in self.facts}
        numbers = [(i.start, _show(i.number)) for i in items_of(text) if i.number is not None]
        self.numbers = {number for _, number in numbers}
        measured = [
            range(f.start, f.end) for f in self.facts if not f.value.replace(".", "").isdigit()
        ]  # part of a dose, a date, an age
        self.bare = {
            number for start, number in numbers if not any(start in span for span in measured)
        }
        self.dates = [set(f.value.split()) for f in self.facts if f.kind == "date"]

    def supports(self, fact: Fact) -> bool:
        """Whether the text says so, too. A number with a unit is supported by the same one without any ("I take 500"), not by one with
        another unit; a date by one that says at least as much; "left knee" by a left without a part, and by "both knees"."""
        if (fact.kind, fact.value) in self.values:
            return True
        if (
            fact.kind == "number" and fact.value.removesuffix("/10").count("/") == 0
        ):  # on a scale of ten, which goes without saying
            number, _, unit = fact.value.replace("/", " ").partition(" ")
            return number in (self.bare if unit else self.numbers)
        if fact.kind == "date":
            parts = set(fact.value.split())
            return any(parts <= date for date in self.dates) or (
                fact.value[0] == "y" and fact.value[1:] in self.numbers
            )
        if fact.kind == "side":
            side, _, part = fact.value.partition(" ")
            sides = {
                v.partition(" ")[0]
                for k, v in self.values
                if k == "side" and (not part or v.partition(" ")[2] in ("", part))
            }
            return (
                side in sides or "both" in sides or (side == "both" and {"left", "right"} <= sides)
            )
        return False


def distinct(found: list[Fact]) -> list[Fact]:
    """The first of each fact that a text says."""
    first: dict[tuple[str, str], Fact] = {}
    for fact in found:
        first.setdefault((fact.kind, fact.value), fact)
    return list(first.values())
