"""Diagnoses, symptoms and findings, under their medical and their lay names."""

import re
from typing import NamedTuple

from .numerals import Item
from .phrases import Found, Phrases, read_table, singular


class Condition(NamedTuple):
    """A condition as it is named."""

    kind: str  # diagnosis, symptom or finding; "" for what only sounds like one
    name: str
    is_weak: bool  # "blood pressure" may mean hypertension, and states none


# Pains are one condition of several parts of the body.
PAINS = {
    "chest pain": "chest",
    "abdominal pain": "abdomen",
    "back pain": "back",
    "neck pain": "neck",
    "ear pain": "ear",
    "eye pain": "eye",
    "tooth pain": "tooth",
}
# What an examination of a part finds there, or not.
EXAMS = {
    "lung": "wheezing; rales; rhonchi; decreased breath sounds; stridor; rub; infiltrate",
    "heart": "heart murmur; gallop; rub; arrhythmia; jugular venous distention",
    "abdomen": "pain; tenderness; lump; bloating; guarding; rebound; hepatomegaly; splenomegaly; "
    "ascites; hernia",
    "neck": "goiter; lymphadenopathy; bruit; jugular venous distention; stiffness; lump",
    "leg": "edema; cyanosis; clubbing; deformity; leg swelling",
    "skin": "rash; lump; wound; erythema; contusion; jaundice; cyanosis; pallor",
    "throat": "erythema; exudate; discharge; lymphadenopathy; nasal congestion; lump",
    "nerves": "weakness; numbness; ataxia; nystagmus; facial droop; tremor; speech difficulty; "
    "hyperreflexia; tingling",
    "bone": "fracture; dislocation; deformity; arthritis; bone spur",
}
# What has a place: "pain in the knee", but no "fever of the knee".
LOCAL = frozenset(
    name.strip()
    for name in (
        """pain; tenderness; numbness; tingling; weakness; stiffness; edema; erythema; lump; wound;
        trauma; cramp;
        itching; rash; tremor; twitching; clicking; instability; deformity; contusion; fracture;
        warmth; discharge; reduced range of motion; muscle atrophy; laceration; scar; bleeding;
        muscle ache; leg swelling; sprain; dislocation; infection"""
    ).split(";")
)
EXAMS_OF: dict[str, list[str]] = {}  # rales: lung
for _exam, _finds in EXAMS.items():
    for _found in _finds.split("; "):
        EXAMS_OF.setdefault(_found, []).append(_exam)
EXAMINED: dict[str, str] = {}  # the word for what is examined: its exam
for _exam, _words in {
    "lung": "lung lungs breath breathing respiratory chest x-ray",
    "heart": "heart cardiac cardiovascular rhythm cardiology ekg",
    "abdomen": "abdomen belly stomach abdominal tummy",
    "neck": "neck thyroid",
    "leg": "leg legs extremities extremity feet foot ankles ankle",
    "skin": "skin integumentary",
    "throat": "throat ears ear nose eyes mouth",
    "nerves": "neurological neuro neurologic reflexes strength sensation nerves gait",
    "bone": "x-ray x-rays xray bone bones bony alignment",
    "all": "exam examination everything physical",
}.items():
    for _word in _words.split():
        EXAMINED[_word] = _exam
NORMAL_WORDS = frozenset(
    """clear normal good fine regular soft supple unremarkable great intact nontender benign
    negative okay well perfect excellent non-tender full""".split()
)
# They sound like a condition and are none.
_NOTHING = (
    "discharge order; discharge instruction; discharge summary; discharge home; discharge planning;"
    "time of discharge; hospital discharge; upon discharge; at discharge; prior to discharge;"
    "fall asleep; falls asleep; fell asleep; falling asleep; cold outside; cold weather;"
    "cva tenderness; cold medicine; cold pack; heat and cold; cold compress; ppd status; cold air;"
    "stress test; stress echo; depression screening; cancer screening; cold cut; fall risk; sugar;"
    "incision and drainage; tetanus immunization; tetanus vaccination; alcoholic drink;"
    "cut down; cut it down; cut back; fractured sleep; alcoholic beverage; non alcoholic;"
    "hay fever vaccine;clear cut;oxygen saturation;cut off;cut through;head start;broken english;"
    "high risk;in the fall;last fall;fall of;stable for discharge;for discharge;"
    "facility discharge;covid pandemic;covid lockdown"
)
CONDITIONS: Phrases[Condition] = Phrases()
for _phrase in _NOTHING.split(";"):
    CONDITIONS.add(_phrase.strip(), Condition("", "", True))
_LITTLE = frozenset("in my your his her the a an of is are was to with on when i you at".split())
KIND_OF: dict[str, str] = {}  # migraine: headache
_ENDINGS = re.compile(
    r"[a-z]{3,}(?:itis|osis|emia|aemia|oma|omas|omata|pathy|pathies|algia|uria|penia|plegia|paresis"
    r"|megaly|rrhea|rrhagia|sclerosis|philia|phobia|ectasis|ptosis|trophy|plasia|cele)"
)
_NOT_CONDITIONS = frozenset(
    """diagnosis diagnoses prognosis prognoses dosis metamorphosis hypnosis
    symptoma coma aroma diploma roma oklahoma therapy anemia apnea academia empathy sympathy
    hematoma osmosis homeopathy telepathy trophy ketosis alopecia neuropathic homeostasis
    psychosis stoma glioma urinalysis""".split()
)

SCATTERED: dict[str, list[list[str]]] = {}  # breast lump: [[breast, lump], ...]


def _telling_words(phrase: str) -> list[str]:
    """The stems of a phrase but for "in", "my" and the like."""
    return [singular(word) for word in phrase.split() if word not in _LITTLE]


for _file, _kind in (("diagnoses", "diagnosis"), ("symptoms", "symptom"), ("findings", "finding")):
    for _key, _names in read_table(f"{_file}.txt"):
        _name, _, _whole = (part.strip() for part in _key.partition("<"))
        if _whole:
            KIND_OF[_name] = _whole
        for _other in [_name, *_names]:
            _told = _telling_words(_other.lstrip("~"))
            if len(_told) > 1:
                SCATTERED.setdefault(_name, []).append(_told)
            CONDITIONS.add(_other.lstrip("~"), Condition(_kind, _name, _other[0] == "~"))


def condition_at(items: list[Item], stems: list[str], i: int) -> Found[Condition] | None:
    """The condition that begins at item i; None where none does."""
    found = CONDITIONS.at(items, stems, i)
    word = stems[i]
    if found or len(word) < 7 or word in _NOT_CONDITIONS or not _ENDINGS.fullmatch(word):
        return found
    return Found(Condition("diagnosis", word, False), 1)
