"""What a dialogue supports, contradicts or does not say of a note."""

import pytest

from loop.facts.matching import compare


def verdict(dialogue: str, note: str, kind: str) -> set[str]:
    return {v.verdict for v in compare(dialogue, note).note if v.statement.kind == kind}


@pytest.mark.parametrize(
    ("dialogue", "note", "kind", "expected"),
    [
        (
            "lungs are clear bilaterally. right knee is swollen",
            "left breast mass",
            "side",
            "not said",
        ),
        ("This one hurts. I take lorazepam", "lorazepam 1 mg for 1 week", "dose", "not said"),
        ("[00:12:40] Doctor: your knee", "prednisone 40 mg", "dose", "not said"),
        ("I take Lantus", "Humalog", "drug", "not said"),
        ("I take OxyContin", "Percocet", "drug", "not said"),
        ("I use Flonase", "Advair", "drug", "not said"),
        ("metoprolol 50 mg and lisinopril 20 mg", "lisinopril 50 mg", "dose", "contradicted"),
        ("Doctor: any chest pain?\nPatient: no", "Reports chest pain.", "symptom", "contradicted"),
        ("Doctor: any chest pain?\nPatient: no", "Denies chest pain.", "symptom", "supported"),
        ("my mother had breast cancer", "She has breast cancer.", "diagnosis", "contradicted"),
        ("stop the ibuprofen", "Continue ibuprofen.", "action", "contradicted"),
        ("for two months", "for 3 months", "duration", "not said"),
        ("twice a day", "b.i.d.", "frequency", "supported"),
        ("every eight hours", "t.i.d.", "frequency", "supported"),
    ],
)
def test_a_verdict(dialogue, note, kind, expected):
    assert verdict(dialogue, note, kind) == {expected}
