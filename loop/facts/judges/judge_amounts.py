"""Whether a text has the doses, frequencies, durations, numbers and dates of another."""

import bisect
from collections.abc import Iterator

from ..measures.dates import WEEKDAYS
from ..measures.units import DAYS, UNITS, Amount, same_scale
from ..reading.parsed import Statement
from ..reading.vocabulary import LOOSE_MEASURES, MEASURES
from .index import Index, distance, same_name
from .verdicts import CONTRADICTED, NOT_SAID, SUPPORTED, Verdict, place_of

_BEFORE_AGE = frozenset("i'm he's she's am turned turning age aged".split())
TO_MG = ("mg", "mcg", "g")  # a tablet holds them
_PIECES = ("tablet", "capsule", "puff", "patch", "spray")
_COUNTS = (2.0, 3.0, 4.0)
_PIECES_REACH = 10  # items between a drug and how many of its tablets are taken
_ELIDED_REACH = 12  # items between a number and the unit before it
_BABY_ASPIRIN = "81 mg"
_PACK_YEARS_SLACK = 0.1
_OF_REACH = 3  # items up to the drug of "75 of the Plavix"
_MEASURE_REACH = 8  # items between a number and what it measures


def judge_of_drug(index: Index, s: Statement) -> Verdict:
    """A dose or how often, which must be said of the same drug."""
    places = index.places_of_drug(s.of) if s.of else []
    same = [
        o
        for o in index.all(s.kind)
        if is_equal(s, o) and (not s.of or not o.of or same_name(s.of, o.of))
    ]
    if same:
        if s.kind == "frequency":
            index.keep_rivals(s, same, [o for o in index.all(s.kind) if not is_equal(s, o)])
        return Verdict(s, SUPPORTED, place_of(same[0]))
    if s.kind == "dose":
        found = (
            _baby_dose(index, s, places) or _bare(index, s, places) or _several(index, s, places)
        )
        if found:
            return found
    other = [o for o in index.all(s.kind) if s.of and o.of and same_name(s.of, o.of)]
    return Verdict(s, CONTRADICTED, place_of(other[0])) if other else Verdict(s, NOT_SAID, None)


def _baby_dose(index: Index, s: Statement, places: list[int]) -> Verdict | None:
    """The 81 mg of a "baby aspirin"."""
    if s.value != _BABY_ASPIRIN or s.of != "aspirin":
        return None
    for i in places:
        if i and index.document.items[i - 1].word in ("baby", "dose"):
            item = index.document.items[i]
            return Verdict(s, SUPPORTED, (item.start, item.end), is_broader=True)
    return None


def _bare(index: Index, s: Statement, places: list[int]) -> Verdict | None:
    """A dose by its number alone, "I take 500", close to its drug."""
    if s.amount is None or s.amount.low != s.amount.high:
        return None
    reach = 6 if s.amount.low < 10 else 30
    for i in index.numbers.get(s.amount.low, ()):
        item = index.document.items[i]
        if index.unit_at(i) or index.document.padded[i + 1].word in UNITS:
            continue
        if _is_others(index, i, places) or _is_age(index, i):
            continue
        if distance(_in_reach(index, places, i, reach), i) <= reach:
            return Verdict(s, SUPPORTED, (item.start, item.end))
    return None


def _several(index: Index, s: Statement, places: list[int]) -> Verdict | None:
    """A dose in several, or parts, of what a tablet holds: "two of the 200", "half a 50"."""
    if s.amount is None or s.amount.unit not in TO_MG or s.amount.low != s.amount.high:
        return None
    strengths = [o.amount for o in index.all("dose") if o.amount and same_name(s.of, o.of)]
    for i, number in _pieces(index):
        if number == 1 or distance(places, i) > _PIECES_REACH:
            continue
        holds = s.amount.low / number
        says = any(_is_strength(a, holds, s.amount.unit) for a in strengths)
        bare = [k for k in index.numbers.get(holds, ()) if index.unit_at(k) == ""]
        if says or (holds >= 1 and any(0 < distance(places, k) < 3 for k in bare)):
            item = index.document.items[i]
            return Verdict(s, SUPPORTED, (item.start, item.end), is_broader=True)
    return None


def _pieces(index: Index) -> Iterator[tuple[int, float]]:
    """(item, number) of tablets and the like, and of "two of the"."""
    for o in index.all("dose"):
        if o.amount and o.amount.unit in _PIECES and o.amount.low == o.amount.high:
            yield o.word, o.amount.low
    for number in _COUNTS:
        for i in index.numbers.get(number, ()):
            if index.unit_at(i) == "" and index.document.padded[i + 1].word == "of":
                yield i, number


def _is_strength(amount: Amount, holds: float, unit: str) -> bool:
    scaled = same_scale(amount, amount._replace(low=holds, high=holds, unit=unit))
    return scaled is not None and _close(scaled[0].low, scaled[1].low, 1e-6)


def _is_others(index: Index, i: int, places: list[int]) -> bool:
    """Whether another drug stands before item i, closer than any of the places."""
    drugs = index.document.drugs
    at = bisect.bisect(drugs, i, key=lambda o: o.word)
    behind = drugs[at] if at < len(drugs) else None
    if behind and index.document.padded[i + 1].word == "of" and behind.word - i <= _OF_REACH:
        return behind.word not in places  # "81 of aspirin, 75 of Plavix"
    at -= 1
    if at < 0 or drugs[at].word in places:
        return False
    return i - drugs[at].word < distance(places, i)


def _is_age(index: Index, i: int) -> bool:
    """Whether the number at item i is how old someone is: "I'm 40"."""
    before = index.document.items[i - 1].word if i else ""
    return before in _BEFORE_AGE and index.document.padded[i + 1].word not in ("on", "of")


def _in_reach(index: Index, places: list[int], i: int, reach: int) -> list[int]:
    """The places of a drug that a bare number may mean; in its sentence for a small one."""
    if reach > 6:
        return places
    sentence = index.document.context.sentence
    return [place for place in places if sentence[place] == sentence[i]]


def judge_amount(index: Index, s: Statement) -> Verdict:
    """A duration, age, number or ratio, said with the same unit or with none."""
    if s.amount is None:  # of more digits than a float keeps
        places = index.places_of_word.get(s.value)
        if not places:
            return Verdict(s, NOT_SAID, None)
        item = index.document.items[places[0]]
        return Verdict(s, SUPPORTED, (item.start, item.end))
    kinds = ("duration", "age") if s.kind in ("duration", "age") else (s.kind,)
    same = [o for o in index.all(*kinds) if is_equal(s, o) and _may_be_one(s, o)]
    if same:
        if s.kind == "duration":
            index.keep_rivals(s, same, [o for o in index.all("duration") if not is_equal(s, o)])
        return Verdict(s, SUPPORTED, place_of(same[0]))
    if s.kind == "ratio":
        dated = _dated(index, s.amount)
        if dated:
            return Verdict(s, SUPPORTED, place_of(dated))
        if s.amount.high != 10:
            return Verdict(s, NOT_SAID, None)
    elif s.amount.low != s.amount.high:
        vague = _is_vaguely(index, s.amount) if s.kind == "duration" and s.amount.is_vague else None
        if vague is not None:
            item = index.document.items[vague]
            return Verdict(s, SUPPORTED, (item.start, item.end), is_broader=True)
        if s.kind == "age":
            return _judge_age_range(index, s, s.amount)
        low = index.numbers.get(s.amount.low, [])
        if s.kind == "number" and low and s.amount.high in index.numbers:
            item = index.document.items[low[0]]
            return Verdict(s, SUPPORTED, (item.start, item.end))
        return Verdict(s, NOT_SAID, None)
    if s.amount.unit == "packyear":
        product = _pack_years(index, s.amount.low)
        if product:
            return Verdict(s, SUPPORTED, place_of(product), is_broader=True)
    number = s.amount.low / 360 if s.kind == "age" else s.amount.low
    if s.kind != "duration":
        for i in index.numbers.get(number, ()):
            if _may_mean(index, i, s):
                item = index.document.items[i]
                return Verdict(s, SUPPORTED, (item.start, item.end))
    if s.kind == "duration":
        elided = _elided(index, s.amount)
        if elided is not None:
            item = index.document.items[elided]
            return Verdict(s, SUPPORTED, (item.start, item.end))
    other = index.all("age") if s.kind == "age" else []
    other += [o for o in index.all("number") if s.of and o.of == s.of]
    return Verdict(s, CONTRADICTED, place_of(other[0])) if other else Verdict(s, NOT_SAID, None)


def _elided(index: Index, amount: Amount) -> int | None:
    """The item of a number that has the unit before it: "married 22 years, ill for twelve"."""
    items = index.document.items
    for unit in ("year", "month", "week", "day"):
        for i in index.numbers.get(amount.low / DAYS[unit], ()):
            said = {UNITS.get(item.word) for item in items[max(0, i - _ELIDED_REACH) : i]}
            if i and items[i - 1].word == "for" and index.unit_at(i) == "" and unit in said:
                return i
    return None


def _pack_years(index: Index, number: float) -> Statement | None:
    """The packs a day that come to so many pack-years over a duration of the text."""
    years = [o.amount.low / DAYS["year"] for o in index.all("duration") if o.amount]
    for o in index.all("number"):
        if o.amount and o.amount.unit == "pack":
            if any(_close(o.amount.low * y, number, _PACK_YEARS_SLACK) for y in years):
                return o
    return None


def _may_be_one(s: Statement, o: Statement) -> bool:
    """Whether two equal amounts may be of the same thing: "pulse 76" is no "sodium 76"."""
    return s.kind != "number" or s.of == o.of or bool({s.of, o.of} & {*LOOSE_MEASURES})


def _judge_age_range(index: Index, s: Statement, amount: Amount) -> Verdict:
    """ "In her forties", by any number without a unit that lies there, such as 47."""
    for number, places in index.numbers.items():
        if amount.low <= number * DAYS["year"] <= amount.high:
            bare = [i for i in places if index.unit_at(i) == ""]
            if bare:
                item = index.document.items[bare[0]]
                return Verdict(s, SUPPORTED, (item.start, item.end))
    other = index.all("age")
    return Verdict(s, CONTRADICTED, place_of(other[0])) if other else Verdict(s, NOT_SAID, None)


def _may_mean(index: Index, i: int, s: Statement) -> bool:
    """Whether a number of the document may be the statement's: it has no other unit."""
    unit = s.amount.unit if s.amount else ""
    if unit and index.unit_at(i) not in ("", unit) and s.kind != "age":
        return False
    if not s.of:
        return True
    if i in index.in_ratios or index.label_at(i) not in (*LOOSE_MEASURES, s.of):
        return False
    words = index.document.words
    near = range(max(0, i - _MEASURE_REACH), min(len(words), i + _MEASURE_REACH))
    following = index.document.padded[i + 1]
    counts = following.gap == "" and words[i + 1 : i + 2] not in ([following.word], [])
    if s.amount and s.amount.low < 10 and counts:
        return False  # "eight people"
    if s.of not in index.measures:
        return True
    return any(MEASURES.get(words[k]) == s.of for k in near)


def _is_vaguely(index: Index, amount: Amount) -> int | None:
    """The item of "months" that no number counts, such as "for years", for "several months"."""
    unit = next((u for u in ("year", "month", "week", "day") if _divides(amount, DAYS[u])), "")
    for i in index.places_of_word.get(unit, ()):
        before = index.document.items[i - 1] if i else None
        if before and index.document.items[i].word == f"{unit}s" and before.number is None:
            return i
    return None


def _divides(amount: Amount, days: float) -> bool:
    return amount.low >= days and amount.low % days == amount.high % days == 0


def judge_date(index: Index, s: Statement) -> Verdict:
    """A date that has all that is stated, or lacks the year alone; a weekday by its name.

    Contradicted where the day or the month alone is another.
    """
    stated = set(s.value.split())
    if s.value in WEEKDAYS:
        return _judge_weekday(index, s)
    for o in index.all("date"):
        if stated <= set(o.value.split()):
            return Verdict(s, SUPPORTED, place_of(o))
    without_year = {part for part in stated if part[0] != "y"}
    for o in index.all("date"):
        if without_year and set(o.value.split()) == without_year:
            return Verdict(s, SUPPORTED, place_of(o), is_broader=True)
    for o in index.all("date"):
        other = set(o.value.split())
        alike = [part[0] for part in other] == [part[0] for part in s.value.split()]
        if alike and len(stated) > 1 and len(stated - other) == 1:
            return Verdict(s, CONTRADICTED, place_of(o))
    return Verdict(s, NOT_SAID, None)


def _judge_weekday(index: Index, s: Statement) -> Verdict:
    """By the same weekday anywhere; contradicted by another one of a date."""
    places = index.places_of_word.get(s.value)
    if places:
        item = index.document.items[places[0]]
        return Verdict(s, SUPPORTED, (item.start, item.end))
    others = [o for o in index.all("date") if o.value in WEEKDAYS]
    return Verdict(s, CONTRADICTED, place_of(others[0])) if others else Verdict(s, NOT_SAID, None)


def _dated(index: Index, amount: Amount) -> Statement | None:
    """The date that a ratio such as 6/19 or 9/03 may be."""
    month, other = f"{amount.low:.0f}", f"{amount.high:.0f}"
    forms = {f"m{month} d{other}", f"m{month} y20{other.zfill(2)}"}
    return next((o for o in index.all("date") if o.value in forms), None)


def is_equal(s: Statement, o: Statement) -> bool:
    """Whether two amounts are one; "4 weeks" are a month, and "a few days" two to four."""
    a, b = s.amount, o.amount
    if a is None or b is None:
        return False
    scaled = same_scale(a, b)
    if scaled is None:
        return False
    a, b, within = scaled
    low, high, other_low, other_high = a.low, a.high, b.low, b.high
    if s.kind in ("dose", "ratio"):
        return _close(low, other_low, within) and _close(high, other_high, within)
    if s.kind == "frequency" and a.at and b.at and a.at != b.at:
        return False  # "at bedtime" is not "in the morning"
    if s.kind == "frequency":
        return _close(low, other_low, 1e-3) and _close(high, other_high, 1e-3)
    slack = 0.08 if s.kind == "duration" and low >= 27 else max(1e-3, within)
    if _close(low, other_low, slack) and _close(high, other_high, slack):
        return True
    if a.is_vague and low <= other_low <= other_high <= high:
        return True
    return other_low != other_high and other_low * 0.999 <= low <= high <= other_high * 1.001


def _close(a: float, b: float, slack: float) -> bool:
    return abs(a - b) <= slack * max(abs(a), abs(b))
