"""Diagnoses, symptoms and findings, under their medical and their lay names."""

import re
from typing import NamedTuple

from .numerals import Item
from .phrases import Found, Phrases, read_table


class Condition(NamedTuple):
    """A condition as it is named."""

    kind: str  # diagnosis, symptom or finding
    name: str
    is_weak: bool  # "blood pressure" may mean hypertension, and states none


CONDITIONS: Phrases[Condition] = Phrases()
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

for _file, _kind in (("diagnoses", "diagnosis"), ("symptoms", "symptom"), ("findings", "finding")):
    for _key, _names in read_table(f"{_file}.txt"):
        _name, _, _whole = (part.strip() for part in _key.partition("<"))
        if _whole:
            KIND_OF[_name] = _whole
        for _other in [_name, *_names]:
            CONDITIONS.add(_other.lstrip("~"), Condition(_kind, _name, _other[0] == "~"))


def condition_at(items: list[Item], stems: list[str], i: int) -> Found[Condition] | None:
    """The condition that begins at item i; None where none does."""
    found = CONDITIONS.at(items, stems, i)
    word = stems[i]
    if found or len(word) < 7 or word in _NOT_CONDITIONS or not _ENDINGS.fullmatch(word):
        return found
    return Found(Condition("diagnosis", word, False), 1)
