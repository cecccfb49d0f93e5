"""Which words are drugs."""

import pytest

from loop.embedded.conditions import DRUGS
from loop.evaluation.drugs import BRANDS, GENERICS, STEMS, generic_name


@pytest.mark.parametrize(
    ("word", "drug"),
    [
        ("lisinopril", "lisinopril"),
        ("tylenol", "acetaminophen"),
        ("acetaminophen", "acetaminophen"),
        ("warfarin", "warfarin"),
        ("cefazolin", "cefazolin"),
        ("ofloxacin", "ofloxacin"),
        ("april", None),
        ("cholesterol", None),
        ("program", None),
        ("pain", None),
        ("person", None),
    ],
)
def test_a_word(word, drug):
    assert generic_name(word) == drug


def test_the_list_holds_only_what_no_stem_finds():
    assert not [name for name in GENERICS if STEMS.fullmatch(name)]
    assert not BRANDS.keys() & BRANDS.values()  # a brand leads to a generic name at once


def test_the_invented_clinics_drugs_are_found():
    assert not [name for name in DRUGS if not generic_name(name.split()[0])]
