"""Numbers in digits and spelled out."""

import pytest

from loop.facts.numerals import parse_items


def numbers(text: str) -> list[tuple[float, str]]:
    return [(i.number, text[i.start : i.end]) for i in parse_items(text) if i.number is not None]


@pytest.mark.parametrize(
    ("spoken", "value"),
    [
        ("one hundred and twenty", 120),
        ("a hundred", 100),
        ("one twenty", 120),
        ("two thousand eight", 2008),
        ("nineteen ninety nine", 1999),
        ("one oh five", 105),
        ("fifty-five", 55),
        ("ninety eight point six", 98.6),
        ("98 point 6", 98.6),
        ("three and a half", 3.5),
        ("1,500", 1500),
        ("36.5", 36.5),
        (".5", 0.5),
        ("seventeen", 17),
        ("zero", 0),
        ("five hundred thousand two", 500002),
        ("point five", 0.5),
        ("zero point oh five", 0.05),
        ("hundred and fifty", 150),
    ],
)
def test_a_number_and_its_place(spoken, value):
    text = f"He said {spoken} again."
    assert numbers(text) == [(value, spoken)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("one two three", [1, 2, 3]),
        ("ten, twenty", [10, 20]),
        ("five or six", [5, 6]),
        ("one hundred. Five of them", [100, 5]),
        ("sixty and me", [60]),
        ("at this point five of us", [5]),
        ("point five, and that", [0.5]),
    ],
)
def test_numbers_that_stand_apart_stay_apart(text, values):
    assert [value for value, _ in numbers(text)] == values


def test_codes_times_decades_and_a_lists_own_numbers_are_none():
    assert numbers(
        "1. Vitamin B12, L5, COVID-19 at 11:30 in her 80s\n 2) hemoglobin A1c of 7.4"
    ) == [(7.4, "7.4")]


def test_a_long_run_of_number_words_is_read():
    assert len(numbers("ten " * 3000)) > 1000
