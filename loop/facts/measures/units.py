"""What an amount is, the units that it may have, and how a report shows it."""

from typing import NamedTuple

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
# What a unit is in another of its dimension.
_SCALES = {
    "mg": {"mcg": 0.001, "mg": 1.0, "g": 1000.0},
    "ml": {"ml": 1.0, "teaspoon": 5.0, "tablespoon": 15.0, "l": 1000.0},
    "cm": {"mm": 0.1, "cm": 1.0, "m": 100.0, "inch": 2.54, "foot": 30.48},
    "kg": {"kg": 1.0, "pound": 0.4536, "ounce": 0.02835},
}
SCALE_OF = {
    unit: (dimension, factor)
    for dimension, factors in _SCALES.items()
    for unit, factor in factors.items()
}
_METRIC = frozenset("mg mcg g ml l teaspoon tablespoon mm cm m kg".split())
# How far two may lie apart that are rounded: "five foot four" is 163 cm.
_EXACTLY, _ROUNDED = 1e-6, 0.01
_HOTTEST_CELSIUS = 45.0  # above it a temperature is in Fahrenheit


class Amount(NamedTuple):
    """An amount that begins at some item. low equals high where it is no range."""

    kind: str  # dose, duration, age, frequency, ratio (120/80) or number
    low: float
    high: float
    unit: str  # "" where there is none, "day" of a duration, "/day" of a frequency
    num_items: int
    is_vague: bool = False  # of "a few days"
    at: str = ""  # the time of day of a frequency: "morning", "night", or none


def same_scale(a: Amount, b: Amount) -> tuple[Amount, Amount, float] | None:
    """Both in one unit, and how far they may lie apart; None where their units can't be compared.

    "A teaspoon" is 5 mL, "180 pounds" are 82 kg, and a temperature is in Fahrenheit.
    """
    if a.unit == b.unit == "degree":
        return _in_fahrenheit(a), _in_fahrenheit(b), 0.001
    if a.unit == b.unit:
        return a, b, _EXACTLY
    if a.unit not in SCALE_OF or b.unit not in SCALE_OF:
        return None
    (dimension, factor), (other, other_factor) = SCALE_OF[a.unit], SCALE_OF[b.unit]
    if dimension != other:
        return None
    slack = _EXACTLY if (a.unit in _METRIC) == (b.unit in _METRIC) else _ROUNDED
    return _times(a, factor), _times(b, other_factor), slack


def _times(amount: Amount, factor: float) -> Amount:
    return amount._replace(low=amount.low * factor, high=amount.high * factor)


def _in_fahrenheit(amount: Amount) -> Amount:
    if amount.high > _HOTTEST_CELSIUS:
        return amount
    return amount._replace(low=amount.low * 1.8 + 32, high=amount.high * 1.8 + 32)


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
