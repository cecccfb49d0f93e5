"""Whether a text has the drugs and allergies of another, and does the same with them."""

from ..drugs import same_drug
from ..reading.parsed import Statement
from ..reading.polarity import DENIED
from .index import Index, distance
from .judge_conditions import by_polarity, misspelled
from .verdicts import CONTRADICTED, NOT_SAID, SUPPORTED, Verdict, place_of

_REVERSE = {"increase": "decrease", "decrease": "increase"}
_ACTION_REACH = 14  # items between a drug and what is done with it
_COME = frozenset(("come", "came", "coming"))
_TAKE = frozenset("take taking takes took use using used more on off".split())


def judge_drug(index: Index, s: Statement) -> Verdict:
    """By the drugs with its ingredients; an allergy by an allergy alone."""
    if s.drug is None:
        return _judge_allergen(index, s)
    mentions = [o for o in index.all("drug", "allergy") if o.drug and same_drug(s.drug, o.drug)]
    if s.kind == "allergy":
        mentions = [o for o in mentions if o.kind == "allergy"]
    if not mentions:
        slip = misspelled(index, s) if s.kind == "drug" else None
        return Verdict(s, SUPPORTED, place_of(slip)) if slip else Verdict(s, NOT_SAID, None)
    broader = all(o.drug and o.drug.ingredients != s.drug.ingredients for o in mentions)
    return Verdict(s, SUPPORTED, place_of(mentions[0]), broader)


def _judge_allergen(index: Index, s: Statement) -> Verdict:
    """A thing that is no drug; also where the dialogue speaks of it without "allergic"."""
    mentions = [o for o in index.all("allergy", "allergen") if o.value == s.value]
    return by_polarity(index, s, mentions)


def judge_action(index: Index, s: Statement) -> Verdict:
    """By what the other text does with the same drug, or treatment."""
    places = index.places_of_drug(s.of) or index.places_of_word.get(s.of, [])
    near = [
        o
        for o in index.all("action")
        if o.of == s.of or (not o.of and distance(places, o.word) <= _ACTION_REACH)
    ]
    stops = [o for o in near if o.value == "stop"]
    goes_on = [o for o in near if o.value != "stop"]
    if s.value == "stop":
        if stops:
            return Verdict(s, SUPPORTED, place_of(stops[0]))
        denied = [i for i in places if _is_off(index, i)]
        if denied:
            item = index.document.items[denied[0]]
            return Verdict(s, SUPPORTED, (item.start, item.end))
        verdict = CONTRADICTED if goes_on else NOT_SAID
        return Verdict(s, verdict, place_of(goes_on[0]) if goes_on else None)
    if stops and not goes_on:
        return Verdict(s, CONTRADICTED, place_of(stops[0]))
    reverse = [o for o in near if o.value == _REVERSE.get(s.value)]
    if reverse and all(o.value != s.value for o in near):
        return Verdict(s, CONTRADICTED, place_of(reverse[0]))
    if not places:
        return Verdict(s, NOT_SAID, None)
    if not goes_on and any(_is_off(index, i) for i in places):
        return Verdict(s, CONTRADICTED, None)
    item = index.document.items[places[0]]
    return Verdict(s, SUPPORTED, (item.start, item.end))


def _is_off(index: Index, i: int) -> bool:
    """Whether the drug at item i is not, or no longer, to be taken: "do not take ibuprofen"."""
    before = [item.word for item in index.document.items[max(0, i - 5) : i]]
    if _COME & set(before) and "off" in before[-3:]:
        return True  # "come off the prednisone"
    if before[-1:] == ["except"] or before[-2:] == ["except", "for"]:
        return True  # "continue your medicines except Prozac"
    needs = " need to take " in f" {' '.join(before)} "  # but not "need a refill"
    if needs and {"no", "n't", "not", "don't"} & set(before[: before.index("need")]):
        return True
    return bool(_TAKE & set(before)) and index.document.context.polarity[i] == DENIED
