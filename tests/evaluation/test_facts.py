"""Facts of a text, and whether another text says them too."""

import json
import re

import pytest
from helpers import ROOT

from loop.evaluation.facts import Statements, distinct, extract_facts


def values(text: str) -> list[str]:
    return [f"{f.kind} {f.value}" for f in extract_facts(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one hundred and twenty over eighty", ["number 120/80"]),
        ("BP 172/93, pulse 65", ["number 172/93", "number 65"]),
        (
            "metformin five hundred milligrams twice a day",
            ["drug metformin", "number 500 mg", "often 2/day"],
        ),
        ("25mg t.i.d.", ["number 25 mg", "often 3/day"]),
        ("three times daily", ["often 3/day"]),
        ("every morning", ["often 1/day"]),
        (
            "vitamin D 2000 units once a week",
            ["drug vitamin d", "number 2000 unit", "often 1/week"],
        ),
        ("an 80-year-old", ["number 80 year"]),
        ("a year ago", ["number 1 year"]),
        ("half a tablet", ["number 0.5 tablet"]),
        ("a pack and a half", ["number 1.5 pack"]),
        ("98.6 F", ["number 98.6 degree"]),
        ("pain is eight out of ten", ["number 8/10"]),
        ("July twenty ninth two thousand eight", ["date m7 d29 y2008"]),
        ("07/29/2008", ["date m7 d29 y2008"]),
        ("in March", ["date m3"]),
        ("may 3rd", ["date m5 d3"]),
        ("she may come", []),
        ("in 2009", ["date y2009"]),
        ("the left knee and both feet", ["side left knee", "side both foot"]),
        ("lungs clear bilaterally", ["side both"]),
        ("pain on the right.", ["side right"]),
        ("all right, I left home. Come back", []),
        ("both of us", []),
        ("All right. Your back hurts", []),
        ("one of the two", []),
        ("7 of them", []),
        ("12 of them", ["number 12"]),
        ("point five milligrams", ["number 0.5 mg"]),
        ("Temp 98.6, HR 72", ["number 98.6", "number 72"]),
        ("He is 45. Day 3", ["number 45"]),
    ],
)
def test_what_a_text_states(text, found):
    assert values(text) == found


def test_a_fact_knows_its_place():
    text = "Takes Tylenol five hundred milligrams."
    assert [text[f.start : f.end] for f in extract_facts(text)] == [
        "Tylenol",
        "five hundred milligrams",
    ]


@pytest.mark.parametrize(
    ("note", "dialogue", "supported"),
    [
        ("acetaminophen 500 mg", "I take Tylenol, five hundred", True),
        ("500 mg", "500 mcg", False),
        ("500 mg", "250 mg", False),
        ("25 mg", "I am 25 years old", False),
        ("25 mg", "25 milligrams", True),
        ("pulse 80", "the pulse is eighty", True),
        ("pulse 80", "pulse 81", False),
        ("120/80", "one twenty over eighty", True),
        ("120/80", "one thirty over eighty", False),
        ("7/10", "I'd say a seven", True),
        ("2/day b.i.d.", "twice a day", True),
        ("twice daily", "once daily", False),
        ("warfarin", "I take coumadin", True),
        ("warfarin", "heparin", False),
        ("left knee", "my left knee hurts", True),
        ("left knee", "my right knee hurts", False),
        ("left knee", "both knees hurt", True),
        ("left knee", "the left arm", False),
        ("left knee", "it is on the left", True),
        ("bilateral ears", "left ear and right ear", True),
        ("July 2008", "July 29th 2008", True),
        ("July 29, 2008", "in July 2008", False),
        ("in 2008", "two thousand eight", True),
        ("in 2007", "2008", False),
    ],
)
def test_whether_a_dialogue_supports_a_note(note, dialogue, supported):
    facts = extract_facts(note)
    statements = Statements(dialogue)
    assert facts and all(statements.supports(fact) for fact in facts) == supported


def test_distinct_keeps_the_first_mention():
    assert [(f.value, f.start) for f in distinct(extract_facts("25 mg, 30 mg, 25 mg"))] == [
        ("25 mg", 0),
        ("30 mg", 7),
    ]


def test_the_embedded_notes_are_all_supported_and_a_changed_number_or_side_is_not():
    """Faults planted into true notes are found: a number of a vital sign, a drug."""
    rows = [
        json.loads(line)
        for line in (ROOT / "loop/embedded/data/test.jsonl").read_text().splitlines()
    ]
    planted = 0
    for row in rows:
        dialogue = Statements(row["dialogue"])
        assert all(dialogue.supports(f) for f in extract_facts(row["soap"])), row["id"]
        pressure = re.search(r"(\d+)/(\d+)", row["soap"])
        wrong = [row["soap"].replace("Start ", "Start dexamethasone and ")]
        if pressure:
            other = f"{int(pressure[1]) + 7}/{pressure[2]}"
            wrong.append(row["soap"].replace(pressure.group(), other))
        for text in wrong:
            found = [f for f in extract_facts(text) if not dialogue.supports(f)]
            assert len(found) == 1, (row["id"], found)
            planted += 1
    assert planted > 150
