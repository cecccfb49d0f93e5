"""The figures of notes."""

import json
import math

import numpy as np
import pytest
from helpers import SHARED

from loop.evaluation.scoring import (
    FIGURES,
    Row,
    as_table,
    interval,
    most_similar,
    ratio,
    score_note,
    summarise,
    unsupported,
)

NOTE = "S: Cough for 3 days, takes warfarin.\nO: Temperature 38.4 C.\nA: Bronchitis.\nP: Amoxicillin 500 mg twice a day."
SAID = "Doctor: Since when?\nPatient: A cough, three days. I take coumadin.\nDoctor: It is 38.4 degrees. Bronchitis. Take amoxicillin 500 twice daily."


def figures(note: str, **more) -> dict[str, float | None]:
    return {
        k: above / below if below else None
        for k, (above, below) in score_note(Row("a", SAID, NOTE, note, **more)).items()
    }


def test_a_note_like_the_reference_has_every_figure_at_its_best():
    found = figures(NOTE, ended=True)
    assert all(
        found[key] == 1
        for key in (
            "rouge1",
            "rougeLsum",
            "S/rouge2",
            "P/rougeL",
            "sections",
            "section/O",
            "ended",
            "length",
            "facts/supported",
        )
    )
    assert (
        found["markdown"] == found["repetition"] == 0
        and found["facts/kept"] == 1
        and found["facts/supported/drug"] == 1
    )


@pytest.mark.parametrize(
    ("note", "figure", "value"),
    [
        (NOTE.replace("A: Bronchitis.\n", ""), "sections", 0),
        (NOTE.replace("A: Bronchitis.\n", ""), "section/A", 0),
        (NOTE.replace("A: Bronchitis.\n", ""), "A/rouge1", 0),
        ("**S:** a\nO: b\nA: c\nP: d", "markdown", 1),
        ("# S: a", "markdown", 1),
        ("a b c d a b c d", "repetition", 1 / 5),
        ("", "length", 0),
        ("", "rouge1", 0),
        ("", "facts/supported", None),
        ("", "facts/kept", 0),
        (NOTE.replace("500", "250"), "facts/supported/number", 2 / 3),
        (NOTE.replace("warfarin", "aspirin"), "facts/supported/drug", 1 / 2),
        (NOTE.replace("twice", "three times"), "facts/supported/often", 0),
        (NOTE.replace("38.4 C", "normal"), "facts/kept", 5 / 6),
    ],
)
def test_what_is_wrong_with_a_note_moves_its_figure(note, figure, value):
    assert figures(note)[figure] == (None if value is None else pytest.approx(value))


def test_what_nobody_knows_counts_nothing():
    """Whether a note from a file was cut off; a section that the reference lacks."""
    assert figures(NOTE)["ended"] is None
    assert score_note(Row("a", SAID, "S: Cough.", NOTE))["P/rouge1"] == (0, 0)


def test_unsupported_facts_are_given_with_every_place():
    note = "Takes aspirin 81 mg. Aspirin again."
    assert [(f.value, note[f.start : f.end]) for f in unsupported(Row("a", SAID, NOTE, note))] == [
        ("aspirin", "aspirin"),
        ("81 mg", "81 mg"),
        ("aspirin", "Aspirin"),
    ]


def test_a_figure_is_a_ratio_of_sums_and_its_interval_covers_it():
    """A mean of ratios would weigh a note with one fact like one with twenty. The interval of a mean is the known one: 1.96 standard errors."""
    assert ratio(np.array([[1.0, 1.0], [0.0, 19.0]])) == 1 / 20 and ratio(np.zeros((2, 2))) is None
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = interval(np.stack([values, np.ones(400)], 1))
    error = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - error, abs=0.03) and high == pytest.approx(
        values.mean() + error, abs=0.03
    )
    assert interval(np.zeros((3, 2))) == (None, None)


def test_the_summary_puts_the_others_beside_the_notes():
    good, bad = score_note(Row("a", SAID, NOTE, NOTE)), score_note(Row("a", SAID, NOTE, SAID))
    report = summarise({"notes": [good, good], "dialogue": [bad, bad]})
    assert (
        report["rouge1"]["value"]
        == report["rouge1"]["low"]
        == report["rouge1"]["high"]
        == 1
        > report["rouge1"]["dialogue"]
        > 0
    )
    assert report.keys() < FIGURES.keys() and "ended" not in report  # nobody knows it here
    table = as_table(report)
    assert (
        as_table({"loss": {"value": 1.5, "low": 1.25, "high": 2.0}}).split()[-6:]
        == "nats a token 1.5000 1.2500 to 2.0000".split()[-6:]
    )
    assert (
        "ROUGE-Lsum" in table
        and "100.0 to 100.0" in table
        and len(table.splitlines()) == len(report) + 1
    )


def test_the_most_similar_text_shares_rare_words():
    corpus = ["doctor the knee hurts", "doctor the ear hurts", "doctor the skin itches"]
    assert most_similar(["the ear the ear", "an itching skin itches", "doctor"], corpus) == [
        1,
        2,
        0,
    ]


@pytest.mark.slow
def test_published_figures_are_met():
    """The floor "copy the dialogue" on ACI-Bench's test1, as others computed it."""
    path = SHARED / "data" / "aci_bench" / "test1.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [score_note(Row(r["id"], r["dialogue"], r["soap"], r["dialogue"])) for r in rows]
    mean = {
        key: 100 * ratio(np.array([s[key] for s in scores]))
        for key in ("rouge1", "rouge2", "rougeLsum")
    }
    assert mean == {
        "rouge1": pytest.approx(32.9, abs=0.05),
        "rouge2": pytest.approx(12.5, abs=0.05),
        "rougeLsum": pytest.approx(30.7, abs=0.05),
    }
