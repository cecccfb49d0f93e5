"""What a dialogue supports, contradicts or does not say of a note."""

import pytest

from loop.facts.matching import compare
from loop.facts.numerals import parse_items
from loop.facts.reading.clauses import is_speech

# (dialogue, note): each statement of the note is supported.
SAID = [
    ("one hundred micrograms", "100 \u00b5g"),
    ("three times a day", "3x daily"),
    ("half a milligram", "0,5 mg"),
    ("one and a half tablets", "1\u00bd tablets"),
    ("a quarter of a tablet", "0.25 tablet"),
    ("two to ten mg", "2-10 mg"),
    ("four M G of zofran", "Zofran 4 mg"),
    ("every eight hours", "q8h"),
    ("twice a day", "bd"),
    ("three times a day", "tds"),
    ("you take 10 mg once daily", "10 mg a day"),
    ("I take lisinopril 10 mg a day", "lisinopril 10 mg once daily"),
    ("your a1c is six . eight", "A1c 6.8"),
    ("it's been a couple of years", "2 years"),
    ("it's been two years", "a couple of years"),
    ("a month", "4 weeks"),
    ("my feet hurt", "bilateral feet"),
    ("he's two and a half years old", "2-1/2-year-old"),
    ("six times a day", "6 times/day"),
    ("in december two thousand nineteen", "12-2019"),
    ("June 19th", "nineteenth June"),
    ("your lungs are clear", "lungs clear bilaterally"),
    ("my left ear hurts", "left otalgia"),
    ("your a1c is eight", "A1c 8"),
    ("he's a 7 year old", "age 7"),
    ("tretinoin", "Retin-A"),
    ("potassium", "K-Dur"),
    ("Any chest pain? No.", "denies chest pain"),
    ("my mother has diabetes", "Family history of diabetes"),
    ("take it every other day", "q.o.d."),
    ("take two puffs every four to six hours", "2 puffs q4-6h"),
    ("i take it at bedtime", "qhs"),
    ("ten units of lantus", "Lantus 10 units"),
    ("the pain is seven out of ten", "7/10"),
    ("it was about 2 weeks ago", "14 days ago"),
    ("half a year", "6 months"),
    ("a year and a half", "18 months"),
    ("a fortnight", "2 weeks"),
    ("blood pressure one forty over ninety", "BP 140/90"),
    ("temperature of ninety eight point six", "98.6 F"),
    ("I have a migraine", "headache"),
    ("There is nothing like chest pain", "denies chest pain"),
]
# (dialogue, note): some statement of the note is not.
NOT_SAID = [
    ("lungs are clear bilaterally. right knee is swollen", "left breast mass"),
    ("This one hurts", "lorazepam 1 mg for 1 week"),
    ("[00:12:40] Doctor: your knee", "prednisone 40 mg"),
    ("[00:40:12] Doctor: you take prednisone", "prednisone 40 mg"),
    ("100 g", "100 \u00b5g"),
    ("once a day", "3x daily"),
    ("5 mg", "0,5 mg"),
    ("I take one tablet", "1\u00bd tablets"),
    ("one tablet", "a quarter of a tablet"),
    ("10 mg", "2-10 mg"),
    ("four M G", "4 m"),
    ("twice", "q8h"),
    ("Lantus", "Humalog"),
    ("OxyContin", "Percocet"),
    ("Flonase", "Advair"),
    ("Pulmicort", "Symbicort"),
    ("Atrovent", "Combivent"),
    ("once daily", "10 mg a day"),
    ("my left ear hurts", "right otalgia"),
    ("left kidney stone", "right ureter stone"),
    ("pain in my right elbow", "left lateral epicondylitis"),
    ("right kidney", "left renal mass"),
    ("your a1c is seven", "A1c 8"),
    ("he is six", "age 7"),
    ("I use a cream", "Retin-A"),
    ("a cream", "Differin"),
    ("chemo", "etoposide"),
    ("x", "Cutivate"),
    ("x", "Norflex"),
    ("x", "K-Dur"),
    ("x", "Pneumovax"),
    ("Any chest pain? No.", "reports chest pain"),
    ("Doctor: any chest pain?\nPatient: yes, some", "denies chest pain"),
    ("my mother has diabetes", "The patient has diabetes."),
    ("i have diabetes", "Mother has diabetes."),
    ("you have a benign tumor", "malignant tumor"),
    ("keep taking the metformin", "Stop metformin"),
    ("stop the metformin", "Continue metformin"),
    ("nothing", "Allergic to penicillin"),
    ("nothing", "smokes one pack a day"),
    ("you're fine", "There is a systolic murmur"),
    ("ten units of lantus", "Lantus 100 units"),
    ("you need an mri", "x-ray of left hip"),
    ("i do n't smoke", "Smokes"),
    ("i drink wine", "denies alcohol"),
]


def verdicts(dialogue: str, note: str) -> dict[str, str]:
    """{kind: verdict} of the note's statements, claims left out."""
    found = compare(dialogue, note).note
    return {v.statement.kind: v.verdict for v in found if v.statement.kind != "claim"}


@pytest.mark.parametrize(("dialogue", "note"), SAID)
def test_what_is_said_is_supported(dialogue, note):
    found = verdicts(dialogue, note)
    assert set(found.values()) == {"supported"}


@pytest.mark.parametrize(("dialogue", "note"), NOT_SAID)
def test_what_is_not_said_is_flagged(dialogue, note):
    assert set(verdicts(dialogue, note).values()) != {"supported"}


@pytest.mark.parametrize(
    ("dialogue", "note", "kind", "expected"),
    [
        ("metoprolol 50 mg and lisinopril 20 mg", "lisinopril 50 mg", "dose", "contradicted"),
        ("Doctor: any chest pain?\nPatient: no", "Reports chest pain.", "symptom", "contradicted"),
        ("Doctor: any cough?\nPatient: I do.", "Denies cough.", "symptom", "contradicted"),
        ("my mother had breast cancer", "She has breast cancer.", "diagnosis", "contradicted"),
        ("stop the ibuprofen", "Continue ibuprofen.", "action", "contradicted"),
        ("my right knee is swollen", "Left knee is swollen.", "side", "contradicted"),
        ("I take it twice a day", "lisinopril", "drug", "not said"),
        ("for two months", "for 3 months", "duration", "not said"),
        ("i feel fine", "Allergic to latex.", "allergy", "not said"),
        # In no table; its ending says what it is.
        ("my knee hurts", "Pericholangitis.", "diagnosis", "not said"),
        ("i can not have latex, i ca n't have it", "Allergic to latex.", "allergy", "supported"),
    ],
)
def test_a_verdict(dialogue, note, kind, expected):
    assert verdicts(dialogue, note)[kind] == expected


def test_a_verdict_knows_its_place():
    dialogue, note = "Patient: I take Tylenol, five hundred.", "S: acetaminophen 500 mg"
    found = compare(dialogue, note).note
    places = {note[v.statement.start : v.statement.end]: v.place for v in found if v.place}
    assert {text: dialogue[slice(*place)] for text, place in places.items()} == {
        "acetaminophen": "Tylenol",
        "500 mg": "five hundred",
    }


def test_timestamps_and_speakers_state_nothing():
    plain = [
        "Doctor: how is his knee?",
        "Guest_family: he takes 20 mg of prednisone, I had asthma",
        "Doctor: okay",
    ]
    stamped = [f"[00:{15 + i}:40] {line}" for i, line in enumerate(plain)]
    for note in ("prednisone 20 mg", "prednisone 40 mg", "knee pain for 15 days", "He has asthma."):
        assert verdicts("\n".join(plain), note) == verdicts("\n".join(stamped), note)


def test_claims_in_other_words_are_refuted_by_their_clause():
    dialogue = (
        "Doctor: any trouble with the stairs?\nPatient: no\nDoctor: do you garden?\nPatient: yes"
    )
    found = {v.statement.value: v.verdict for v in compare(dialogue, "Reports gardening.").note}
    assert set(found.values()) <= {"supported"}
    refuted = compare(dialogue, "Reports trouble with stairs. Denies garden.").note
    assert [v.verdict for v in refuted if v.statement.kind == "claim"] == ["contradicted"] * 2


def test_a_dialogue_is_told_from_a_note_by_how_it_speaks():
    for text in ("how are you ? i'm okay", "Doctor: hello\nPatient: hi", "I take it"):
        assert is_speech(text, parse_items(text))
    for text in ("S: Denies pain.\nP: Follow-up.", "Patient reports a cough for two weeks."):
        assert not is_speech(text, parse_items(text))
