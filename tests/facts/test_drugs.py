"""Which words are drugs, and which are the same."""

import pytest

from loop.embedded.conditions import DRUGS
from loop.facts.drugs import drug_at, same_drug
from loop.facts.statements import Document


def drug(text: str):
    document = Document(text)
    found = drug_at(document.padded, document.stems, 0)
    return found.meaning if found else None


@pytest.mark.parametrize("word", ["april", "cholesterol", "program", "pain", "person"])
def test_a_word_that_is_none(word):
    assert drug(word) is None


@pytest.mark.parametrize("name", ["Retin-A", "Differin", "etoposide", "Norflex", "K-Dur", "Lantus"])
def test_rarer_drugs_are_found(name):
    assert drug(name)


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("tylenol", "acetaminophen", True),
        ("coumadin", "warfarin", True),
        ("insulin", "Lantus", True),
        ("Humalog", "Lantus", False),
        ("Percocet", "OxyContin", False),
        ("Percocet", "oxycodone", True),
        ("Advair", "Flonase", False),
        ("Combivent", "Atrovent", False),
    ],
)
def test_whether_two_names_mean_one_drug(name, other, same):
    assert same_drug(drug(name), drug(other)) == same == same_drug(drug(other), drug(name))


def test_the_invented_clinics_drugs_are_found():
    assert not [name for name in DRUGS if not drug(name)]
