"""The metrics of notes, their intervals, and their table."""

import json
import math

import numpy as np
import pytest
from helpers import SHARED

from loop.config.schema import TaskConfig
from loop.data.soap import SOAP
from loop.evaluation import scoring
from loop.evaluation.run import list_unsupported
from loop.evaluation.scoring import (
    METRICS,
    Metric,
    Row,
    as_table,
    flagged,
    interval,
    metrics_of,
    ratio,
    score_note,
    summarise,
)

NOTE = """S: Cough for 3 days, takes warfarin.
O: Temperature 38.4 C.
A: Bronchitis.
P: Amoxicillin 500 mg twice a day."""
DIALOGUE = """Doctor: Since when?
Patient: A cough, three days. I take coumadin.
Doctor: It is 38.4 degrees. Bronchitis. Take amoxicillin 500 twice daily."""


def metrics(note: str, **more) -> dict[str, float | None]:
    scores = score_note(Row("a", DIALOGUE, NOTE, note, **more))
    return {name: ratio(np.array([score])) for name, score in scores.items()}


def test_a_note_like_the_reference_has_every_metric_at_its_best():
    found = metrics(NOTE, ended=True)
    best = (
        *(
            "rouge1",
            "rougeLsum",
            "S/rouge2",
            "P/rougeL",
            "A/rouge2",
            "edits",
            "sections",
            "section/O",
            "ended",
        ),
        *("length", "facts/supported", "facts/kept", "facts/supported/drug"),
    )
    assert {name: found[name] for name in best} == dict.fromkeys(best, 1)
    assert found["markdown"] == found["repetition"] == found["looped"] == 0
    assert metrics(NOTE, ended=False, looped=True)["looped"] == 1


@pytest.mark.parametrize(
    ("note", "name", "value"),
    [
        (NOTE.replace("A: Bronchitis.\n", ""), "sections", 0),
        (NOTE.replace("A: Bronchitis.\n", ""), "section/A", 0),
        (NOTE.replace("A: Bronchitis.\n", ""), "A/rouge1", 0),
        ("**S:** a\nO: b\nA: c\nP: d", "markdown", 1),
        ("# S: a", "markdown", 1),
        ("a b c d a b c d", "repetition", 1 / 5),
        ("", "length", 0),
        (NOTE.replace("Cough", "Coughing"), "length", 1),  # words, not characters
        ("", "rouge1", 0),
        ("", "facts/supported", None),
        ("", "facts/kept", 0),
        (NOTE.replace("500", "250"), "facts/supported/dose", 0),
        (NOTE.replace("500", "250"), "facts/supported/P", 2 / 3),
        (NOTE.replace("500", "250"), "facts/critical", 1 / 8),
        (NOTE.replace("500", "250"), "facts/unsaid", 1 / 8),
        (NOTE.replace("Cough", "No cough"), "facts/contradicted", 1 / 8),
        (NOTE.replace(", takes warfarin", ""), "facts/kept/S", 2 / 3),
        (NOTE.replace("P: ", "P: No degrees. "), "facts/claims", 3 / 4),
        (NOTE.replace("warfarin", "aspirin"), "facts/supported/drug", 1 / 2),
        (NOTE.replace("twice", "three times"), "facts/supported/frequency", 0),
        (NOTE.replace("38.4 C", "normal"), "facts/kept", 7 / 8),
    ],
)
def test_what_is_wrong_with_a_note_moves_its_metric(note, name, value):
    assert metrics(note)[name] == (None if value is None else pytest.approx(value))


def test_a_section_is_compared_with_the_references_own():
    """A right plan beside a wrong assessment: each has its own figure."""
    found = metrics(NOTE.replace("Bronchitis", "Asthma of old"))
    assert found["A/rouge1"] == 0 and found["P/rouge1"] == found["S/rougeLsum"] == 1


def test_what_nobody_knows_counts_nothing():
    """Whether a note from a file was cut off; a section that the reference lacks."""
    assert metrics(NOTE)["ended"] is metrics(NOTE)["looped"] is None
    assert score_note(Row("a", DIALOGUE, "S: Cough.", NOTE))["P/rouge1"] == (0, 0)


def test_a_fact_that_is_said_often_counts_once():
    said = "Patient: I have a cough. A bad cough. And fever.\nDoctor: The cough, since when?"
    score = score_note(Row("a", said, NOTE, "S: Cough."))
    assert score["facts/kept"] == (1, 2)


def test_flagged_statements_are_given_with_every_mention():
    note = "S: 250 mg of aspirin and 250 mg."
    found = flagged(Row("a", DIALOGUE, NOTE, note))
    assert [(v.statement.value, note[v.statement.start : v.statement.end]) for v in found] == [
        ("250 mg", "250 mg"),
        ("aspirin", "aspirin"),
        ("250 mg", "250 mg"),
    ]
    assert {v.verdict for v in found} == {"not said"} and all(v.is_critical for v in found)


def test_a_metric_is_a_ratio_of_sums_and_its_interval_covers_it():
    """A mean of ratios would give a note with one fact the weight of one with twenty.

    The interval of a mean is the known one: 1.96 standard errors.
    """
    assert ratio(np.array([[1.0, 1.0], [0.0, 19.0]])) == 1 / 20 and ratio(np.zeros((2, 2))) is None
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = interval(np.stack([values, np.ones(400)], 1))
    error = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)
    # Of 0 and 2: the standard error is 1, and Student's t of one degree of freedom 12.7.
    assert interval(np.array([[0.0, 1.0], [2.0, 1.0]])) == pytest.approx((1 - 12.7062, 1 + 12.7062))
    assert interval(np.zeros((3, 2))) == (None, None)
    assert interval(np.ones((1, 2))) == (None, None)  # one value tells nothing of the spread


def test_the_interval_of_a_few_notes_holds():
    """Wilson's for shares; coverage of what notes have, for 4 and 10 of them."""
    assert interval(np.ones((4, 2)), share=True) == (pytest.approx(0.5101, abs=1e-4), 1)
    assert interval(np.array([[0.0, 1.0]] * 9 + [[1.0, 1.0]]), share=True) == (
        pytest.approx(0.0179, abs=1e-4),
        pytest.approx(0.4042, abs=1e-4),
    )
    assert interval(np.full((4, 2), 10.0), share=True)[0] < 0.6  # facts of a note go together
    draw = np.random.default_rng(0)
    for n in (4, 10):
        held = {"share": 0, "likeness": 0, "facts": 0, "length": 0}
        for _ in range(400):
            counts = draw.integers(3, 25, n)
            facts = draw.binomial(counts, draw.beta(8.5, 1.5, n))
            samples = {
                "share": (draw.random(n) < 0.8, np.ones(n), 0.8),
                "likeness": (draw.beta(8, 8, n), np.ones(n), 0.5),
                "facts": (facts, counts, 0.85),
                "length": (draw.normal(5, 2, n), np.ones(n), 5),
            }
            for name, (above, below, truth) in samples.items():
                pairs = np.stack([above, below], 1).astype(float)
                low, high = interval(pairs, share=name != "length")
                held[name] += low <= truth <= high
        assert min(held.values()) > 0.91 * 400, held


def test_student_t_is_that_of_the_tables():
    table = {1: 12.706, 3: 3.182, 8: 2.306, 9: 2.262, 30: 2.042, 120: 1.980}
    assert {n: scoring.student_t(n) for n in table} == pytest.approx(table, rel=1e-3)


def test_the_summary_puts_the_others_beside_the_notes():
    good = score_note(Row("a", DIALOGUE, NOTE, NOTE))
    bad = score_note(Row("a", DIALOGUE, NOTE, DIALOGUE))
    report = summarise({"notes": [good, good], "dialogue": [bad, bad]})
    rouge1 = report["rouge1"]
    assert rouge1["value"] == rouge1["high"] == 1 > rouge1["dialogue"] > 0
    assert 0.3 < rouge1["low"] < 0.4 and rouge1["of"] == 2  # two notes tell little
    assert report.keys() < metrics_of(SOAP).keys() and "ended" not in report  # nobody knows it here
    loss = as_table({"loss": {"value": 1.5, "low": 1.25, "high": 2.0}})
    assert loss.split()[-6:] == "nats a token 1.5000 1.2500 to 2.0000".split()[-6:]
    table = as_table(report)
    assert "ROUGE-Lsum" in table and "34.2 to 100.0" in table and "100.0 to 100.0" not in table
    assert "fewer than 10 notes" in table and len(table.splitlines()) == len(report) + 2
    enough = as_table(summarise({"notes": [good] * 10}))
    assert "fewer than" not in enough


def test_a_long_title_keeps_the_columns():
    task = TaskConfig(request="Write the note.", headings=["Assessment and plan", "Exam"])
    report = {name: {"value": 0.5, "low": 0.25, "high": 0.75} for name in metrics_of(task)}
    _, *lines = as_table(report, task).splitlines()
    figures = [line for line in lines if "50.0" in line]
    assert len(figures) > 20 and len({line.index("50.0") for line in figures}) == 1


def test_a_metric_added_from_outside_stands_in_report_and_table(monkeypatch):
    """One function and one entry are all that a metric needs."""

    def questions(note: scoring.ParsedNote) -> scoring.Score:
        return float(note.row.note.count("?")), float(len(note.words))

    added = Metric("question marks a word", questions, "{:.3f}".format)
    monkeypatch.setitem(METRICS, "questions", added)
    notes = [score_note(Row("a", DIALOGUE, NOTE, note)) for note in ("S: Cough? Pain?", "S: No")]
    dialogue = score_note(Row("a", DIALOGUE, NOTE, DIALOGUE))
    report = summarise({"notes": notes, "dialogue": [dialogue, dialogue]})
    assert report["questions"]["value"] == 2 / 5  # a ratio of sums over both notes
    assert 0 < report["questions"]["dialogue"] < report["questions"]["value"]
    last = as_table(report).splitlines()[-2]  # before the remark on few notes
    assert last.split()[:5] == ["question", "marks", "a", "word", "0.400"]


@pytest.mark.slow
def test_published_metrics_are_met():
    """The baseline "copy the dialogue" on ACI-Bench's test1, as others computed it."""
    path = SHARED / "data" / "aci_bench" / "test1.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [score_note(Row(r["id"], r["dialogue"], r["soap"], r["dialogue"])) for r in rows]
    mean = {
        name: 100 * ratio(np.array([score[name] for score in scores]))
        for name in ("rouge1", "rouge2", "rougeLsum")
    }
    assert mean == {
        "rouge1": pytest.approx(32.9, abs=0.05),
        "rouge2": pytest.approx(12.5, abs=0.05),
        "rougeLsum": pytest.approx(30.7, abs=0.05),
    }


def test_the_list_of_what_is_unsupported_names_verdict_kind_and_section_but_no_claims_words():
    note = (
        NOTE.replace("500", "250").replace("S: ", "S: No cough. ").replace("P: ", "P: No degrees. ")
    )
    (lines,) = list_unsupported([Row("a", DIALOGUE, NOTE, note)]).values()
    assert lines[0].startswith("critical, contradicted, ") and "degree" not in " ".join(lines)
    assert "critical, contradicted, symptom: no cough [S]" in lines
    assert "critical, contradicted, claim: characters" in " ".join(lines)
    assert lines[-1] == "critical, not said, dose: 250 mg of amoxicillin [P]"
    assert list_unsupported([Row("a", DIALOGUE, NOTE, NOTE)]) == {}


def test_a_place_where_a_section_begins_is_in_it():
    starts = [(3, "S"), (9, "P")]
    found = [scoring.section_of(starts, place) for place in (0, 3, 8, 9)]
    assert found == ["", "S", "S", "P"]


def test_notes_that_are_not_counted_leave_the_interval_as_it_is():
    counted = np.array([(1.0, 3.0), (2.0, 4.0), (3.0, 3.0)])
    others = np.vstack([counted, np.zeros((20, 2))])
    for share in (True, False):
        assert interval(others, share) == interval(counted, share)
