"""Which words are drugs, and which of them are the same.

The World Health Organization gives related drugs a common stem ("The use of stems in the selection
of International Nonproprietary Names", 2018). So endings find most generic names, also those that
no list of ours holds. The table drugs.txt adds generic names without a stem, and what brands hold.
A drug is the set of its ingredients: Percocet is oxycodone and acetaminophen, never OxyContin.
"""

import re
from typing import NamedTuple

from .numerals import Item
from .phrases import Found, Phrases, read_table

STEMS = re.compile(
    r"[a-z]+(?:"
    r"pril|sartan|olol|statin|azole|cillin|mycin|micin|cycline|floxacin|gliptin|gliflozin|"
    r"glutide|tidine|triptan|azepam|azolam|caine|tinib|parin|xaban|gatran|setron|dronate|"
    r"dipine|oxetine|profen|coxib|lukast|terol|asone|isone|olone|onide|ciclovir|cyclovir|"
    r"amivir|navir|buvir|thiazide|semide|formin|glitazone|dafil|racetam|barbital|fibrate|grel|"
    r"zosin|dopa|tropium|steride|tadine|trexate|mab|pitant|gestrel|tadiol|ipramine|triptyline|"
    r"pram|giline|peridol|peridone|fenac|oxicam|bactam|penem|ezolid|asteine"
    r")|(?:cef|cephal[eo]|sulfa)[a-z]{3,}"
)
# A stem matches them.
NOT_DRUGS = frozenset(("aldosterone", "april", "cholesterol", "cortisone", "cocaine"))


class Drug(NamedTuple):
    """A drug as it is named."""

    ingredients: frozenset[str]  # "insulin:lispro" is a kind of insulin
    name: str  # as a report shows it
    is_generic: bool  # named by its ingredient, not by a brand


_NO_BRANDS = ("vaccine", "vaccination", "shot")  # "pneumonia shot" is any


def _read_drugs() -> Phrases[Drug]:
    phrases: Phrases[Drug] = Phrases()
    for key, names in read_table("drugs.txt"):
        ingredients = frozenset(key.split("+"))
        name = " and ".join(part.replace(":", " ") for part in key.split("+"))
        if len(ingredients) == 1:
            kind = key.partition(":")
            phrases.add(kind[0], Drug(frozenset([kind[0]]), kind[0], True))
            if kind[2]:
                phrases.add(f"{kind[0]} {kind[2]}", Drug(ingredients, name, True))
        for other in names:
            phrases.add(other, Drug(ingredients, name, other.split()[-1] in _NO_BRANDS))
    return phrases


DRUGS = _read_drugs()


def drug_at(items: list[Item], stems: list[str], i: int) -> Found[Drug] | None:
    """The drug that begins at item i; None where none does. stems: as `Phrases.at` wants them."""
    found = DRUGS.at(items, stems, i)
    word = items[i].word
    if word == "oxygen" and stems[i + 1] in ("saturation", "sat"):
        return None
    if found or len(word) < 6 or word in NOT_DRUGS or not STEMS.fullmatch(word):
        return found
    return Found(Drug(frozenset([word]), word, True), 1)


def same_drug(said: Drug, other: Drug) -> bool:
    """Whether two names mean the same drug.

    A generic name covers its kinds and the combinations with it ("insulin" covers Lantus,
    "oxycodone" Percocet), two brands with unlike ingredients or forms are never one.
    """
    if said.ingredients == other.ingredients:
        return True
    return _covers(said, other) or _covers(other, said)


def _covers(general: Drug, special: Drug) -> bool:
    if not general.is_generic:
        return False
    plain = {ingredient.partition(":")[0] for ingredient in special.ingredients}
    return general.ingredients <= plain | special.ingredients
