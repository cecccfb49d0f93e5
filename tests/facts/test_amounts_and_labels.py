"""Amounts in other units, in parts and in words; what a number measures; sides in Latin letters."""

import pytest

from loop.facts.matching import check

# (dialogue, right, wrong)
PAIRS = [
    ("Doctor: a milligram and a half of Risperdal", "Risperidone 1.5 mg.", "Risperidone 2.5 mg."),
    ("Doctor: a teaspoon and a half of amoxicillin", "Amoxicillin 7.5 mL.", "Amoxicillin 15 mL."),
    ("Doctor: a tablespoon of lactulose", "Lactulose 15 mL.", "Lactulose 5 mL."),
    ("Patient: I weigh 180 pounds.", "Weight 82 kg.", "Weight 180 kg."),
    ("Doctor: your temperature is 101.2", "Temp 38.4 C.", "Temp 37 C."),
    ("Doctor: half a tablet of the atenolol fifty", "Atenolol 25 mg.", "Atenolol 100 mg."),
    ("Patient: two of the 200 milligram Advil", "Ibuprofen 400 mg.", "Ibuprofen 800 mg."),
    ("Patient: 81 of aspirin, 75 of Plavix", "Clopidogrel 75 mg.", "Aspirin 75 mg."),
    ("Patient: dialysis Monday, Wednesday, Friday", "Dialysis MWF.", "Dialysis daily."),
    ("Patient: dialysis on Mondays and Fridays", "Dialysis twice weekly.", "Dialysis weekly."),
    ("Patient: metformin morning and night", "Metformin b.i.d.", "Metformin t.i.d."),
    ("Patient: iron, one in the morning, one at night", "Iron twice daily.", "Iron t.i.d."),
    ("Patient: iron twice a day", "Iron, 1 in the morning, 1 at night.", "Iron 1 in the morning."),
    ("Patient: metformin with breakfast and with dinner", "Metformin bid.", "Metformin qam."),
    ("Patient: I've had a cough since Tuesday.", "Cough since Tuesday.", "Cough since Friday."),
    ("Patient: I had it on June 12th.", "Onset June 12.", "Onset July 12."),
    ("Patient: My mom died in her forties.", "Mother died in her 40s.", "Mother died in her 60s."),
    ("Patient: My dad was 47 when he died.", "Father died in his 40s.", "Father died in his 50s."),
    ("Doctor: BP 118/76, pulse is 64, okay?", "BP 118/76, pulse 64.", "Pulse 76."),
    ("Doctor: so hemoglobin is 10, white count is 12", "WBC 12.", "Hemoglobin 12."),
    ("Patient: a pack a day for thirty years", "30 pack-years.", "60 pack-years."),
    ("Doctor: drops in your right eye", "Drops OD.", "Drops OS."),
    ("Doctor: I'd put drops in both ears.", "Ear drops AU.", "Drops OU."),
    ("Patient: penicillin gives me hives", "Penicillin allergy.", "NKDA."),
    ("Patient: I'm allergic to shellfish.", "Shellfish allergy.", "Latex allergy."),
    ("Patient: I smoked for years but I quit", "Former smoker.", "Current smoker."),
    ("Doctor: let's switch you from Zocor to Lipitor", "Stop Zocor.", "Stop Lipitor."),
    ("Doctor: I'll replace your Zocor with Lipitor", "Start Lipitor.", "Discontinue Lipitor."),
    ("Patient: five, six times a day", "5-6 times daily.", "Once daily."),
    ("Patient: coughing three going on four weeks", "Cough for 3-4 weeks.", "Cough 3-4 months."),
    ("Patient: married 22 years, lupus for twelve", "Lupus for 12 years.", "Lupus for 15 years."),
    ("Patient: It was Christmas of 2018.", "December 25, 2018.", "December 24, 2018."),
    ("Doctor: your pulse ox is 98, heart rate is 68", "SpO2 98%, pulse 68.", "Pulse 98."),
    ("Patient: I got my MMR.", "MMR given.", "Tdap given."),
    ("Doctor: still smoking?\nPatient: Not for years", "Quit smoking.", "Currently smokes."),
    ("Patient: the chest pain stopped", "Chest pain resolved.", "Ongoing chest pain."),
    ("Doctor: the scan ruled out gallstones", "No gallstones.", "Cholelithiasis."),
    ("Doctor: I doubt it's appendicitis.", "No appendicitis.", "Appendicitis."),
    ("Doctor: no doubt it's appendicitis, okay?", "Appendicitis.", "No appendicitis."),
    ("Patient: I had covid-19.", "COVID in the past.", "Denies COVID-19."),
    ("Patient: I've had pain for six weeks.", "Six-week history of pain.", "History of migraine."),
]


@pytest.mark.parametrize(("dialogue", "right", "wrong"), PAIRS)
def test_the_right_one_is_supported_and_the_wrong_one_noticed(dialogue, right, wrong):
    assert {v.verdict for v in check(dialogue, right)} == {"supported"}
    assert {v.verdict for v in check(dialogue, wrong)} - {"supported"}


# (note, note): letters that are no side, a frequency that is none, an allergy that is none
UNREAD = [
    ("Metoprolol 25 mg OD.", "right of eye"),
    ("The cervical os is closed.", "left of eye"),
    ("Takes Claritin allergy relief.", "allergy"),
    ("Stiff in the morning and at night.", "frequency"),
]


@pytest.mark.parametrize(("note", "kind"), UNREAD)
def test_what_only_looks_like_a_fact_is_none(note, kind):
    read = {v.statement.kind for v in check(note, note)} | {v.title for v in check(note, note)}
    assert kind not in read
