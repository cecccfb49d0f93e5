"""Amounts of a text: doses, durations, ages, measurements, and how often something happens.

An amount is a range of numbers with a unit. Durations are in days, so that "a fortnight" and
"2 weeks" are one; frequencies are times a day, so that "every 8 hours" is "t.i.d.".
"""

from ..numerals import JOINS, TEENS_AND_TENS, Item, together
from .frequencies import frequency_at
from .units import DAYS, DOSES, UNITS, Amount

_CONCENTRATED = frozenset("mg mcg g ml l mmol meq unit".split())
_WHOLES = {form: form for form in ("dl", "l", "ml", "min", "hr", "kg")}  # of "mg/dL"
_WHOLES |= dict.fromkeys(("deciliter", "decilitre"), "dl") | {"liter": "l", "milliliter": "ml"}
_WHOLES |= {"minute": "min", "hour": "hr", "kilogram": "kg", "kilo": "kg"}
# Units that "a" and "half a" may stand before, as in "a week" and "half a tablet".
_AFTER_ARTICLE = frozenset(
    """hour day week fortnight month year decade pack glass beer tablet capsule puff
    teaspoon tablespoon mg mcg g ml spray""".split()
)
# "a couple of", "a few", and where they lie at most
_VAGUE = {"couple": (2.0, 2.0), "few": (2.0, 4.0), "several": (3.0, 9.0), "dozen": (12.0, 12.0)}
# "in her forties"
_DECADES = {f"{tens}s": int(tens) for tens in "20 30 40 50 60 70 80 90".split()}
for _word, _value in TEENS_AND_TENS.items():
    if _word[-1] == "y":
        _DECADES |= {_word.replace("y", "ies"): _value, f"{_word}s": _value}  # "forty's"
_OWNERS = frozenset("his her their my your".split())
_PARTS_OF_ONE = {"half": 0.5, "quarter": 0.25, "third": 1 / 3}


def amount_at(text: str, items: list[Item], i: int) -> Amount | None:
    """The amount that begins at item i; None where none does.

    items: with some empty ones behind the last, so that it can look ahead.
    """
    found = _decade(items, i) if items[i].word == "in" else None
    return found or frequency_at(items, i) or _ratio(items, i) or _quantity(text, items, i)


def _decade(items: list[Item], i: int) -> Amount | None:
    """ "In her forties", "in his early 60s"."""
    end = i + 2 + (items[i + 2].word in ("early", "mid", "late"))
    years = _DECADES.get(items[end].word.replace("'", ""))
    if items[i + 1].word not in _OWNERS or years is None or not together(items, i, end):
        return None
    low, high = years * DAYS["year"], (years + 9) * DAYS["year"]
    return Amount("age", low, high, "day", end + 1 - i, is_vague=True)


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
    above, end = items[i].number, i + 1 + (items[i + 1].word in JOINS[:3])
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
    return together(items, i, i + 1) and items[i + 2].word not in UNITS


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
        if items[end].word in UNITS and together(items, i, end):
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
    elif [item.word for item in items[end : end + 2]] == ["going", "on"]:
        other, end = items[end + 2].number, end + 3  # "three going on four weeks"
    elif items[end].word in JOINS and items[end + 1].number is not None:
        is_and = items[end].word == "and" and items[i - 1].word != "between"
        if not is_and and together(items, i, end + 1):
            other, end = items[end + 1].number, end + 2
    elif items[end].word in UNITS and items[end + 1].word in ("to", "or"):
        same = UNITS.get(items[end + 3].word) == UNITS[items[end].word]
        if same and items[end + 2].number is not None and together(items, i, end + 3):
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
    if word == "next" and UNITS.get(following) in DAYS:
        return 1.0, 1.0, i + 1
    if word in ("a", "an") and UNITS.get(following) in _AFTER_ARTICLE and len(following) > 1:
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
