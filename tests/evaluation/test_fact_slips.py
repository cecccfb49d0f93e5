"""Small differences of what a note states, each of which a clinician would stop at.

Read from the metric alone, however facts are found.
"""

import pytest

from loop.evaluation.scoring import Row, score_note


def supported(dialogue: str, note: str) -> bool:
    """Whether the dialogue supports all facts of the note, of which there is at least one."""
    found, stated = score_note(Row("a", dialogue, note, note))["facts/supported"]
    assert stated > 0
    return found == stated


@pytest.mark.parametrize(
    ("note", "said", "another"),
    [
        (
            "P: Lisinopril q.i.d.",
            "Take lisinopril four times a day",
            "Take lisinopril three times a day",
        ),
        (
            "P: Lisinopril t.i.d.",
            "Take lisinopril three times a day",
            "Take lisinopril twice a day",
        ),
        ("S: A cough for 3 weeks.", "A cough for three weeks", "A cough for three months"),
        ("S: A cough for 3 weeks.", "A cough for three weeks", "A cough for three days"),
        (
            "P: Levothyroxine 50 mcg.",
            "Levothyroxine, fifty micrograms",
            "Levothyroxine, fifty milligrams",
        ),
        (
            "O: Blood pressure 120/80.",
            "The blood pressure is 120 over 80",
            "The blood pressure is 120 over 70",
        ),
        (
            "O: Blood pressure 120/80.",
            "The blood pressure is 120 over 80",
            "The blood pressure is 120",
        ),
        (
            "O: Blood pressure 120/80.",
            "The blood pressure is one twenty over eighty",
            "The blood pressure is one thirty over eighty",
        ),
        ("O: The score was 10.", "The score was ten", "The score was twelve"),
        ("S: There were 10 of them.", "There were ten of them", "There were twelve of them"),
        ("S: Surgery on July 29, 2008.", "Surgery on July 29th 2008", "Surgery on July 29th 2009"),
        ("S: Surgery on 7/29/08.", "Surgery on July 29th 2008", "Surgery on July 29th 1998"),
    ],
)
def test_another_number_is_not_what_was_said(note, said, another):
    assert supported(f"Doctor: {said}.", note)
    assert not supported(f"Doctor: {another}.", note)
