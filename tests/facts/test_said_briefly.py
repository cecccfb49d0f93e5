"""Short exchanges, each with a statement that is right and one that is wrong."""

import pytest

from loop.facts.matching import check

# (dialogue, right, wrong)
PAIRS = [
    ("Doctor: we'll bump up your metoprolol", "Increase metoprolol.", "Decrease metoprolol."),
    ("Doctor: cut your metoprolol in half", "Decrease metoprolol.", "Increase metoprolol."),
    ("Doctor: we'll take you off the warfarin.", "Stop warfarin.", "Continue warfarin."),
    ("Doctor: trazodone 50 mg at bedtime", "Trazodone 50 mg qhs.", "Trazodone 50 mg qam."),
    ("Patient: methotrexate 15 mg on Mondays", "Methotrexate weekly.", "Methotrexate daily."),
    ("Patient: My wife has the flu. I have gout.", "He has gout.", "The patient has the flu."),
    ("Doctor: I'll give you Pneumovax.", "Pneumovax given.", "Prevnar given."),
    ("Doctor: how much do you smoke?\nPatient: a pack a day", "Smokes.", "Denies smoking."),
    ("Doctor: do you smoke?\nPatient: I wish I could say no", "Smokes.", "Denies smoking."),
    ("Doctor: anything for the pain?\nPatient: no", "Reports pain.", "Denies pain."),
    ("Doctor: and no dizziness?\nPatient: yes, I do", "Reports dizziness.", "Denies dizziness."),
    ("Doctor: do you know if you had gout?\nPatient: no", "Denies gout.", "Has gout."),
    ("Patient: I'm allergic to sulfa.", "Sulfa allergy.", "No known drug allergies."),
    ("Patient: my mom noticed a rash on my back.", "Rash on the back.", "Denies rash."),
]


@pytest.mark.parametrize(("dialogue", "right", "wrong"), PAIRS)
def test_the_right_one_is_supported_and_the_wrong_one_noticed(dialogue, right, wrong):
    assert {v.verdict for v in check(dialogue, right)} == {"supported"}
    assert {v.verdict for v in check(dialogue, wrong)} - {"supported"}
