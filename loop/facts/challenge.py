"""Makes notes that are right wrong in one place each, to see what the scorer notices.

The corruptions are made with patterns of their own, so that what the scorer can't read is counted
as missed.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .judges.verdicts import SUPPORTED, distinct
from .matching import check

_NUMBERS = "two three four five six seven eight nine ten".split()
_FAMILY = "mother|father|sister|brother|aunt|uncle|grandmother|grandfather|son|daughter"
_FAMILY += "|mom|dad|parents|siblings"
_RELATIVE = re.compile(
    rf"\b(?:(?:[Hh]is|[Hh]er|[Tt]he patient's|[Mm]y) )?(?:{_FAMILY})\b|\b[Ff]amily history",
    re.IGNORECASE,
)
_INHERITED = re.compile(
    "cancer|diabet|hypertens|blood pressure|heart|stroke|stone|migraine|seizure|melanoma|asthma",
    re.IGNORECASE,
)
COMMON_DRUGS = """metformin lisinopril atorvastatin amlodipine metoprolol omeprazole losartan
    gabapentin sertraline levothyroxine warfarin prednisone furosemide ibuprofen amoxicillin
    albuterol tramadol insulin clopidogrel hydrochlorothiazide""".split()
RARE_DRUGS = """etoposide Retin-A Differin Cutivate Norflex K-Dur Pneumovax methimazole lithium
    Depakote colchicine Zofran finasteride Plaquenil Humira tamoxifen Lasix Coumadin Dilantin
    Sinemet""".split()
DIAGNOSES = """diabetes; hypertension; breast cancer; congestive heart failure; asthma; pneumonia;
    stroke; atrial fibrillation; hypothyroidism; rheumatoid arthritis; chronic kidney disease;
    depression; epilepsy; tuberculosis; hepatitis C; multiple sclerosis; gout; lupus; COPD;
    schizophrenia; Parkinson's disease; deep vein thrombosis; pancreatitis; glaucoma; HIV;
    leukemia; sleep apnea; osteoporosis; psoriasis; myocardial infarction"""
FINDINGS = """There are crackles at both lung bases.; There is a systolic murmur.; The abdomen is
    distended.; There is pitting edema.; There is hepatomegaly.; There is cervical lymphadenopathy.;
    There is diffuse wheezing.; There is a maculopapular rash.; There is jaundice.; There is a
    resting tremor.; There is nystagmus.; The thyroid is enlarged."""
ALLERGIES = "penicillin sulfa codeine aspirin latex iodine morphine cephalexin".split()
HABITS = """He smokes one pack of cigarettes per day.; He drinks a bottle of wine every day.; He
    uses cocaine.; Tobacco use is positive.; Alcohol abuse.; He uses heroin.; Smokes marijuana."""


class Corruption(NamedTuple):
    """A note with one place changed."""

    kind: str  # a key of KINDS
    note: str


Change = Callable[[str, str, random.Random], str | None]  # of (note, dialogue, rng)


def _listed(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(";")]


def _one(pattern: str, replace: Callable[[re.Match, random.Random], str | None]) -> Change:
    """Changes one match of the pattern, drawn at random; None where nothing can be changed."""
    compiled = re.compile(pattern)

    def change(note: str, dialogue: str, rng: random.Random) -> str | None:
        changes = [(m, new) for m in compiled.finditer(note) for new in [replace(m, rng)] if new]
        if not changes:
            return None
        match, new = rng.choice(changes)
        return note[: match.start()] + new + note[match.end() :]

    return change


def _times_ten(match: re.Match, rng: random.Random) -> str:
    return f"{10 * float(match[1]):g}{match[2]}"


def _other_pressure(match: re.Match, rng: random.Random) -> str | None:
    above, below = int(match[1]), int(match[2])
    if not (60 < above < 260 and 30 < below < above):
        return None
    return f"{above + rng.choice((-30, 20, 30, 40))}/{below}"


def _other_number(match: re.Match, rng: random.Random) -> str:
    number = match[1].lower()
    numbers = _NUMBERS if number in _NUMBERS else [str(n) for n in range(2, 13)]
    new = rng.choice([n for n in numbers if n != number])
    return new + match[2] + (match[3] if match[3].endswith("s") or "-" in match[2] else match[3])


_OFTEN = {
    "twice": "three times", "once": "twice", "three times": "once", "four times": "twice",
    "two times": "four times", "b.i.d.": "q.i.d.", "bid": "qid", "t.i.d.": "b.i.d.",
    "q.i.d.": "b.i.d.", "every day": "three times a day", "daily": "three times a day",
    "weekly": "daily", "every 4 hours": "every 12 hours", "every 6 hours": "every 12 hours",
    "every 8 hours": "every 4 hours", "every 12 hours": "every 4 hours",
}  # fmt: skip
_SIDES = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def _other_frequency(match: re.Match, rng: random.Random) -> str:
    return _OFTEN[match[0].lower()]


def _swapped_dose(note: str, dialogue: str, rng: random.Random) -> str | None:
    """The dose of another drug of the note."""
    found = list(re.finditer(r"([A-Za-z]{5,}),? (\d+(?:\.\d+)?)(?= ?(?:mg|milligrams?)\b)", note))
    pairs = [(a, b) for a in found for b in found if a[1] != b[1] and a[2] != b[2]]
    if not pairs:
        return None
    first, other = rng.choice(pairs)
    return note[: first.start(2)] + other[2] + note[first.end(2) :]


def _other_drug(names: list[str]) -> Change:
    """Another drug in the place of one of the common ones."""
    pattern = re.compile(rf"\b(?:{'|'.join(COMMON_DRUGS)}|Tylenol|aspirin|naproxen)\b", re.I)

    def change(note: str, dialogue: str, rng: random.Random) -> str | None:
        found = list(pattern.finditer(note))
        unsaid = [name for name in names if name.lower() not in (note + dialogue).lower()]
        if not found or not unsaid:
            return None
        match = rng.choice(found)
        return note[: match.start()] + rng.choice(unsaid) + note[match.end() :]

    return change


def _add(heading: str, sentences: Iterable[tuple[str, str]]) -> Change:
    """A sentence more in a section. sentences: each with the word that the visit must lack."""
    choices = list(sentences)

    def change(note: str, dialogue: str, rng: random.Random) -> str | None:
        both = (note + dialogue).lower()
        unsaid = [sentence for sentence, word in choices if word.lower() not in both]
        if not unsaid:
            return None
        section = re.search(rf"^{heading}:.*?(?=^[SOAP]:|\Z)", note, re.M | re.S)
        end = section.end() if section else len(note)
        body = note[:end].rstrip()
        stop = "" if body.endswith((".", ":")) else "."
        return f"{body}{stop} {rng.choice(unsaid)}\n{note[end:]}"

    return change


def _to_patient(match: re.Match, rng: random.Random) -> str | None:
    """The relative of a sentence that names one relative and what he has."""
    sentence = match[0]
    relatives = list(_RELATIVE.finditer(sentence))
    if len(relatives) != 1 or not _INHERITED.search(sentence):
        return None
    relative = relatives[0]
    if relative[0].lower().startswith("family"):
        new = "Medical history" if relative[0][0] == "F" else "medical history"
    else:
        new = "The patient" if relative[0][0].isupper() else "the patient"
    return sentence[: relative.start()] + new + sentence[relative.end() :]


def _cased(new: str) -> Callable[[re.Match, random.Random], str]:
    return lambda match, rng: new.capitalize() if match[0][0].isupper() else new


FALSE_ALARMS = "flagged as they are"
KINDS: dict[str, Change] = {
    "dose x 10": _one(
        r"\b(\d+(?:\.\d+)?)( ?-?(?:mg|mcg|milligrams?|micrograms?|units)\b)", _times_ten
    ),
    "dose of another drug": _swapped_dose,
    "blood pressure": _one(r"\b(\d{2,3})/(\d{2,3})\b", _other_pressure),
    "duration": _one(
        rf"(?i)\b(\d+|{'|'.join(_NUMBERS)})([ -])((?:day|week|month|year|hour)s?)\b"
        r"(?![- ]olds?|/| of age)",
        _other_number,
    ),
    "frequency": _one(
        rf"(?i)\b(?<!twice )(?<!once )(?<!times )(?:{'|'.join(map(re.escape, _OFTEN))})(?!\w)",
        _other_frequency,
    ),
    "side": _one(r"\b(?:left|right)\b", lambda match, rng: _SIDES[match[0]]),
    "another drug": _other_drug(COMMON_DRUGS),
    "a rarer drug": _other_drug(RARE_DRUGS),
    "denies -> reports": _one(r"\b[Dd]eni(?:es|ed)\b", _cased("reports")),
    "reports -> denies": _one(r"\b(?:[Rr]eport(?:s|ed)|[Ee]ndorses)\b", _cased("denies")),
    "no X -> X": _one(
        r"\b(?:[Nn]o|[Ww]ithout)(?: any| evidence of)? (?=[a-z]{4})"
        r"(?!longer|further|change|known|acute|other|issue|problem|more|previous|prior|signif)",
        lambda match, rng: " ",
    ),
    "family -> patient": _one(r"[^.\n]+", _to_patient),
    "invented family history": _add(
        "S", [(f"Family history of {name}.", name) for name in _listed(DIAGNOSES)]
    ),
    "invented diagnosis": _add(
        "A", [(f"The patient has {name}.", name) for name in _listed(DIAGNOSES)]
    ),
    "benign -> malignant": _one(r"\b[Bb]enign\b", _cased("malignant")),
    "continue -> stop": _one(
        r"\b[Cc]ontinue(?= (?:to take |taking |on |with )?(?:the |her |his |your )?[A-Za-z]+)",
        _cased("stop"),
    ),
    "invented finding": _add(
        "O", [(text, text.rstrip(".").split()[-1]) for text in _listed(FINDINGS)]
    ),
    "invented allergy": _add("S", [(f"Allergic to {name}.", name) for name in ALLERGIES]),
    "invented habit": _add("S", [(text, text.split()[-2][:5]) for text in _listed(HABITS)]),
}  # fmt: skip


def corrupt(note: str, dialogue: str, seed: int) -> Iterator[Corruption]:
    """The note corrupted in one place for each kind that it offers a place for.

    seed: equal seeds draw equal places.
    """
    for kind, change in KINDS.items():
        changed = change(note, dialogue, random.Random(f"{seed} {kind}"))
        if changed and changed != note:
            yield Corruption(kind, changed)


def challenge(pairs: Iterable[tuple[str, str]], first: int = 0) -> dict[str, list[int]]:
    """{kind: [corruptions noticed, corruptions]} of notes that are right, and FALSE_ALARMS.

    A corruption is noticed where the scorer flags more than in the note as it was. FALSE_ALARMS are
    [flagged, stated] of the notes as they are, claims left out.

    pairs: (dialogue, note). first: the number of the first pair, which decides what is drawn.
    """
    counts = {kind: [0, 0] for kind in (*KINDS, FALSE_ALARMS)}
    for number, (dialogue, note) in enumerate(pairs, first):
        before, claims_before = _flags(dialogue, note)
        counts[FALSE_ALARMS][0] += len(before)
        counts[FALSE_ALARMS][1] += sum(
            v.statement.kind != "claim" for v in distinct(check(dialogue, note))
        )
        for corruption in corrupt(note, dialogue, number):
            after, claims_after = _flags(dialogue, corruption.note)
            counts[corruption.kind][0] += bool(after - before) or claims_after > claims_before
            counts[corruption.kind][1] += 1
    return counts


def _flags(dialogue: str, note: str) -> tuple[set[tuple], int]:
    """(what the scorer flags in a note, how many claims it refutes)"""
    flagged = [v for v in distinct(check(dialogue, note)) if v.verdict != SUPPORTED]
    stated = [v.statement for v in flagged if v.statement.kind != "claim"]
    found = {(s.kind, s.value, s.of, s.polarity, s.subject) for s in stated}
    return found, len(flagged) - len(stated)


def as_table(counts: dict[str, list[int]]) -> str:
    """The counts of `challenge` as text, a line for each kind that was tried."""
    lines = [
        f"  {kind:28}{100 * seen / tried:6.1f} %  {seen:5,} of {tried:,}"
        for kind, (seen, tried) in counts.items()
        if tried
    ]
    return "\n".join(["  made wrong in one place, and noticed:", *lines])
