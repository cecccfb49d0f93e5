"""What people's own notes taught: each note says what its dialogue says, in other words."""

import pytest

from loop.facts.matching import check

# (dialogue, note that is right, note that is wrong)
PAIRS = [
    (
        "Doctor: how do you rate the pain?\nPatient: a six\nDoctor: worse at night?\nPatient: no",
        "Pain is 6/10.",
        "Denies pain.",
    ),
    ("Doctor: any pain in your leg?\nPatient: a little, not much", "Leg pain.", "No leg pain."),
    (
        "Doctor: any infections during your pregnancy?\nPatient: no",
        "No infections during pregnancy.",
        "She is not pregnant. Denies pregnancy.",
    ),
    ("Patient: I used to have seizures.", "He had a seizure.", "Current seizures."),
    (
        "Doctor: do you drink?\nPatient: not anymore, I used to be an alcoholic",
        "Alcohol abuse in the past.",
        "Currently drinks alcohol.",
    ),
    (
        "Doctor: Take all your medicines except Prozac, okay?",
        "Discontinue Prozac.",
        "Discontinue Zoloft.",
    ),
    ("Patient: he drinks milk every couple hours", "Milk q.2h.", "Milk q.6h."),
    ("Patient: my mother gets migraines", "Migraine on maternal side.", "Denies any migraine."),
    (
        "Patient: my granny had cancer\nDoctor: what kind of cancer?\nPatient: well, breast cancer",
        "Grandmother had breast cancer.",
        "The patient has breast cancer.",
    ),
    (
        "Doctor: you're not on Cardizem and your heart rate is up",
        "She is not on Cardizem and her heart rate is up.",
        "She has no tachycardia.",
    ),
    ("Doctor: did you get hurt?\nPatient: no", "Denies trauma.", "Reports trauma."),
    ("Patient: one baby aspirin in the morning", "Aspirin 81 mg.", "Aspirin 325 mg."),
    ("Doctor: I'll see you next week.", "Follow up in 1 week.", "Follow up in 2 weeks."),
    (
        "Doctor: right or left handed?\nPatient: Right.",
        "He is right-handed.",
        "He is left-handed.",
    ),
    ("Patient: I have sores in my mouth.", "Stomatitis.", "No stomatitis."),
    ("Doctor: lung problems?\nPatient: No.", "Denies COPD.", "Asthma."),
    ("Doctor: numb in both hands?\nPatient: just the left", "Left hand.", "Right hand."),
    ("Patient: I've been sober for years", "No alcohol.", "Drinks daily."),
    ("Doctor: smoker?\nPatient: former", "Former smoker.", "Current smoker."),
    ("Patient: my kids had strep, I have gout", "Gout.", "The patient has strep throat."),
    ("Doctor: your temp is ninety nine nine", "Temperature 99.9.", "Temperature 98.6."),
    ("Patient: I'm out of town from the nineteenth", "Away from the 19th.", "Away from the 18th."),
]


@pytest.mark.parametrize(("dialogue", "right", "wrong"), PAIRS)
def test_the_right_one_is_supported_and_the_wrong_one_noticed(dialogue, right, wrong):
    assert {v.verdict for v in check(dialogue, right)} <= {"supported"}
    assert {v.verdict for v in check(dialogue, wrong)} - {"supported"}


# (note, what it does not state)
UNSTATED = [
    ("With 0 being no pain and 10 being the worst possible pain.", "pain"),
    ("He does not require daily medication.", "frequency"),
    ("Since her husband died her headaches are worse.", "headache (family)"),
    ("Started pottery during the COVID-19 pandemic.", "covid-19"),
    ("No long-term relief of his sciatica.", "no sciatica"),
    ("A man with no past history presented with malaise.", "no fatigue"),
]


@pytest.mark.parametrize(("note", "stated"), UNSTATED)
def test_what_only_looks_like_a_fact_is_none(note, stated):
    found = check(note, note)
    assert stated not in {v.statement.kind for v in found} | {v.title for v in found}
