"""What a wrong note says the other way round, each beside the right one."""

import pytest

from loop.facts.matching import check

# (dialogue, a right note, a wrong note)
EITHER = [
    ("Patient: my back hurts", "Reports back pain.", "Denies back pain."),
    ("Doctor: any fever?\nPatient: no", "Denies fever.", "Denies no fever."),
    ("Doctor: any nausea?\nPatient: nah", "Denies nausea.", "Reports nausea."),
    ("Doctor: any nausea?\nPatient: once in a while", "Reports nausea.", "Denies nausea."),
    ("Doctor: any rash?\nPatient: what is that?\nDoctor: spots.\nPatient: no", "No rash.", "Rash."),
    ("Doctor: any rash?\nPatient: yeah, it's bad. no rash", "No rash.", "Rash."),
    ("Doctor: come off the prednisone", "Stop prednisone.", "Continue prednisone."),
    (
        "Doctor: i'd like to lower your metoprolol",
        "Decrease metoprolol.",
        "Increase metoprolol.",
    ),
    ("Patient: penicillin gives me hives", "Penicillin allergy.", "Allergic to codeine."),
    ("Patient: diabetes runs in my family", "Family history of diabetes.", "History of diabetes."),
    ("Doctor: a stone in the right ureter", "Right ureteral stone.", "Left ureteral stone."),
    (
        "Doctor: you have pain over the medial side. i press on the outside, is that painful?\n"
        "Patient: no",
        "No pain to palpation of the lateral aspect.",
        "Pain to palpation of the lateral aspect.",
    ),
    (
        "Patient: my back hurts\nDoctor: i press here, does that hurt?\nPatient: no",
        "Reports back pain.",
        "Denies back pain.",
    ),
]


@pytest.mark.parametrize(("dialogue", "right", "wrong"), EITHER)
def test_a_right_note_is_left_alone_and_its_opposite_is_noticed(dialogue, right, wrong):
    facts = [v for v in check(dialogue, right) if v.statement.kind != "claim"]
    assert {v.verdict for v in facts} <= {"supported"}
    assert {v.verdict for v in check(dialogue, wrong)} - {"supported"}
