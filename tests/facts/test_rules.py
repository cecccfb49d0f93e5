"""The rules for ranges, denials, questions, comparisons and possessives, each by an example."""

import pytest

from loop.facts.matching import check

# (dialogue, note): each statement of the note is supported.
SAID = [
    ("take ibuprofen every four to six hours", "ibuprofen q4-6h"),
    ("take ibuprofen once or twice a day", "ibuprofen 1-2 times daily"),
    ("take ibuprofen two or three times a week", "ibuprofen 2-3x/week"),
    ("take it on alternate days", "every other day"),
    ("i exercise three days a week", "exercises 3 times a week"),
    ("i drink a beer or two on weekends", "1 to 2 beers on weekends"),
    ("I've had it for a day or two", "for 1-2 days"),
    ("it hurts, seven to eight out of ten", "Pain 7-8/10"),
    ("they were 265 milligrams per deciliter", "265 mg/dL"),
    ("he takes five hundred five hundred milligrams of naproxen", "naproxen 500 mg"),
    ("point one twenty five M G of Xanax", "Xanax 0.125 mg"),
    ("six point twenty five milligrams", "6.25 mg"),
    ("Patient: for the last week and a half", "for 1.5 weeks"),
    ("three quarters of a tablet", "\u00be of a tablet"),
    ("two thirds of a tablet", "two thirds of a tablet"),
    ("twenty second of november", "22 Nov"),
    ("the thyroid's a bit enlarged", "thyromegaly"),
    ("crackles in both bases", "rales at the bases bilaterally"),
    ("I use my right hand for everything", "right-handed"),
    ("lymph nodes in your neck on the right hand side", "cervical lymph nodes on the right side"),
    ("pain in my flank. a kidney stone on the left", "left kidney stone"),
    ("Doctor: how is your back pain?\nPatient: I do not have any", "No longer has back pain."),
    ("Doctor: I don't see any problem. I just want to check for a hernia", "Possible hernia."),
    ("Doctor: margins were negative, the tumor is out", "Tumor removed."),
    ("my asthma is quiet", "She denies recent issues with asthma."),
    ("weak in my right leg", "No other weakness."),
    ("Doctor: no fever or chills, right?\nPatient: yeah, nothing", "Denies fever or chills."),
    ("Doctor: do you smoke?\nPatient: nope, I quit", "Quit smoking."),
    ("Patient: I can't stop sneezing", "Reports sneezing."),
    ("Doctor: any cough?\nPatient: no", "He denies, however, any cough."),
    ("Doctor: any of this run in the family, diabetes?\nPatient: no", "No diabetes in relatives."),
    ("Patient: I fell off a ladder", "Fall with injury."),
    ("lower your salt to twenty three hundred milligrams a a day", "2300 mg daily"),
    ("my seasonal allergies, congestion", "congestion from allergies"),
    ("zero being no pain and ten being the worst pain, it's six out of ten", "Rated 6/10."),
    ("Doctor: I don't see any wounds\nPatient: yeah", "No wounds."),
    ("Patient: I had a fall but no injury", "Denied injury at the time of the fall."),
    ("seasonal allergies, sneezing", "Allergies:\nNone stated."),
    ("I have chest pain", "FAMILY HISTORY\n\nNone.\n\nREVIEW OF SYSTEMS\n\nReports chest pain."),
    ("I have chest pain", "Family History\nNone.\nPhysical Exam\nChest pain."),
    ("my mother had a stroke", "FAMILY HISTORY\nStroke"),
]
# (dialogue, note): some statement of the note is not.
NOT_SAID = [
    ("I had a stroke", "FAMILY HISTORY\nStroke"),
    ("take ibuprofen every four to eight hours", "ibuprofen q4-6h"),
    ("take ibuprofen every six hours", "ibuprofen q4-6h"),
    ("take ibuprofen every four to six hours", "ibuprofen every 6 hours"),
    ("take ibuprofen three to four times a day", "ibuprofen 2-3 times a day"),
    ("i exercise three days a week", "exercises 4 days per week"),
    ("it hurts, seven to eight out of ten", "Pain 8-9/10"),
    ("one tablet", "a third of a tablet"),
    ("i'm 20 and i take lisinopril", "lisinopril 20 mg"),
    ("you're right. which one of them is it?", "right ankle pain"),
    ("right there on the left side near my belly button", "right periumbilical tenderness"),
    ("I had my H I V test", "She has HIV."),
    ("I wish I had some weight loss", "Reports weight loss."),
]
# (dialogue, a right note, a wrong note)
EITHER = [
    ("Patient: I can't breathe", "Reports dyspnea.", "Denies dyspnea."),
    ("Patient: i ca n't sleep", "Reports insomnia.", "Denies insomnia."),
    ("Patient: I have no energy", "Reports fatigue.", "Denies fatigue."),
    (
        "Patient: tingling in my hand but no numbness",
        "Tingling of hand. No numbness.",
        "Numbness of hand. No tingling.",
    ),
    (
        "Patient: my knee hurts\nDoctor: does that hurt?\nPatient: no",
        "Reports knee pain.",
        "Denies knee pain.",
    ),
    (
        "Doctor: your mcmurray's test is negative just checking the meniscus",
        "McMurray's test: Negative.",
        "McMurray's test: Positive.",
    ),
    (
        "Patient: both knees hurt, the right is worse than the left",
        "Bilateral knee pain, right worse than left.",
        "Bilateral knee pain, left worse than right.",
    ),
    (
        "Patient: my mother died.\nDoctor: how did she pass?\nPatient: She had lung cancer",
        "Mother died of lung cancer.",
        "The patient has lung cancer.",
    ),
    (
        "Doctor: do you smoke?\nPatient: no",
        "He is a non-cigarette smoker.",
        "He is a cigarette smoker.",
    ),
    (
        "Doctor: any change in your bowel habits?\nPatient: no",
        "No changes in bowel habits.",
        "Changes in bowel habits.",
    ),
    ("Patient: I don't garden", "Denies gardening.", "Reports gardening."),
    (
        "Patient: I have another sister. She is a diabetic",
        "Sister with diabetes.",
        "The patient has diabetes.",
    ),
    ("Patient: I can't walk without pain", "Reports pain.", "Denies pain."),
    ("Patient: I never felt palpitations like this", "Palpitations.", "No palpitations."),
    (
        "Doctor: do you have tenderness here?\nPatient: no\nPatient: my knee hurts there",
        "Reports knee pain.",
        "Denies knee pain.",
    ),
    ("Patient: I feel pain free now", "Pain free.", "Reports pain."),
]


def verdicts(dialogue: str, note: str, claims: bool = False) -> set[str]:
    found = check(dialogue, note)
    return {v.verdict for v in found if claims or v.statement.kind != "claim"}


@pytest.mark.parametrize(("dialogue", "note"), SAID)
def test_what_is_said_otherwise_is_supported(dialogue, note):
    assert verdicts(dialogue, note) <= {"supported"}


@pytest.mark.parametrize(("dialogue", "note"), NOT_SAID)
def test_what_is_not_said_is_flagged(dialogue, note):
    assert verdicts(dialogue, note) - {"supported"}


@pytest.mark.parametrize(("dialogue", "right", "wrong"), EITHER)
def test_a_right_note_is_left_alone_and_a_wrong_one_is_noticed(dialogue, right, wrong):
    assert verdicts(dialogue, right) <= {"supported"}
    assert verdicts(dialogue, wrong, claims=True) - {"supported"}
