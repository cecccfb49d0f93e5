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
        ("P: Lisinopril b.i.d.", "Take lisinopril twice a day", "Take lisinopril once a day"),
        ("P: Lisinopril daily.", "Take lisinopril once a day", "Take lisinopril twice a day"),
        ("P: Lisinopril q.o.d.", "Take lisinopril every other day", "Take lisinopril every day"),
        ("P: Lisinopril weekly.", "Take lisinopril once a week", "Take lisinopril once a month"),
        ("P: Ibuprofen q6h.", "Take ibuprofen every six hours", "Take ibuprofen every eight hours"),
        (
            "P: Metformin 1 g.",
            "Metformin, one thousand milligrams",
            "Metformin, one hundred milligrams",
        ),
        ("P: Metformin 1.5 tablets.", "Metformin, one and a half tablets", "Metformin, one tablet"),
        (
            "P: Amoxicillin 500 mg for 10 days.",
            "Amoxicillin five hundred milligrams for ten days",
            "Amoxicillin five hundred milligrams for seven days",
        ),
        ("S: A cough for 2 months.", "A cough for two months", "A cough for two weeks"),
        ("S: A cough for 18 months.", "A cough for a year and a half", "A cough for a year"),
        (
            "S: A 54-year-old man with a cough.",
            "I am fifty four years old, I have a cough",
            "I am forty five years old, I have a cough",
        ),
        (
            "O: Temperature 38.5.",
            "The temperature is thirty eight point five",
            "The temperature is thirty eight point one",
        ),
        (
            "O: Oxygen saturation 97%.",
            "The oxygen saturation is ninety seven percent",
            "The oxygen saturation is ninety two percent",
        ),
        ("S: Pain 7/10.", "The pain is seven out of ten", "The pain is four out of ten"),
        ("S: Left knee pain.", "My left knee hurts", "My right knee hurts"),
        ("S: Denies chest pain.", "Any chest pain? No", "Any chest pain? Yes"),
        ("S: Reports fever.", "I have a fever", "I have no fever"),
        ("P: Start Lantus 10 units.", "Start Lantus, ten units", "Start Lantus, twenty units"),
        ("P: Continue lisinopril.", "Continue the lisinopril", "Stop the lisinopril"),
        ("S: Takes Tylenol.", "I take acetaminophen", "I take ibuprofen"),
        ("S: Allergic to penicillin.", "I am allergic to penicillin", "I am allergic to latex"),
        ("S: Mother had breast cancer.", "My mother had breast cancer", "I had breast cancer"),
        (
            "P: Prednisone 40 mg, lisinopril 10 mg.",
            "Prednisone forty milligrams and lisinopril ten milligrams",
            "Prednisone ten milligrams and lisinopril forty milligrams",
        ),
        (
            "S: Headache for 3 days.",
            "I have had a headache for three days",
            "I have had a headache for three hours",
        ),
        ("S: Migraine.", "I have a migraine", "I have a stomach ache"),
        ("S: Surgery in March 2015.", "Surgery in march of 2015", "Surgery in may of 2015"),
        ("S: Smokes.", "I smoke", "I don't smoke"),
        ("S: No cough.", "Nope, no cough", "I have a cough"),
        (
            "P: Ibuprofen 400 mg 3 times a day.",
            "Ibuprofen four hundred milligrams three times a day",
            "Ibuprofen four hundred milligrams three times a week",
        ),
    ],
)
def test_another_number_is_not_what_was_said(note, said, another):
    assert supported(f"Doctor: {said}.", note)
    assert not supported(f"Doctor: {another}.", note)
