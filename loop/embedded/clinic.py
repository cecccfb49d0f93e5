"""The invented clinic: visits as facts, their dialogues and their SOAP notes.

Everything follows from integer seeds, so the files of a split can be generated again byte for byte.
Some combinations of a condition with a drug, a side or a past illness belong to the valid or the
test split alone (`home_split`). Training and pre-training never see them.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from . import phrases
from .conditions import (
    ALLERGIES,
    CONDITIONS,
    DRUGS,
    HISTORY,
    LATE,
    SURNAMES,
    Condition,
)

DATA = Path(__file__).parent / "data"
SPLITS = {"train": 1000, "valid": 100, "test": 100}
NAMES = tuple(ALLERGIES)
ILLNESSES = tuple(HISTORY)
# Regular medicines that an allergy forbids although they are not in the table of new drugs.
MEDICINE_CLASS = {"aspirin": "nsaid", "sulfasalazine": "sulfa"}
THIS_YEAR = 2025
MAX_PAIRS = 12  # of a doctor's and a patient's turn in a dialogue

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options; faster than rng.choice, which matters for the pre-training corpus."""
    return options[int(rng.random() * len(options))]


@dataclass(slots=True)
class Visit:
    """The facts of one visit. An empty text: the fact does not come up."""

    surname: str
    sex: str  # "woman" or "man"
    age: int
    condition: str
    side: str  # "left", "right" or ""
    complaint: str
    duration: str
    symptoms: tuple[str, ...]
    denied: str
    history: str
    year: str  # of the operation if the history is one
    medicine: str  # taken regularly, with dose and frequency
    allergy: str
    habit: str  # "smokes 10 cigarettes a day", "does not smoke", ...
    temperature: str
    pressure: str
    pulse: str
    saturation: str
    breathing: str
    findings: tuple[str, ...]
    diagnosis: str
    excluded: str
    drug: str
    dose: str
    frequency: str
    length: str
    test: str
    advice: str
    follow_up: str

    @property
    def title(self) -> str:
        return ("Mrs " if self.sex == "woman" else "Mr ") + self.surname

    @property
    def prescription(self) -> str:
        return f"{self.drug} {self.dose} {self.frequency} for {self.length}"

    @property
    def past(self) -> str:
        """The history with its year, if it has one."""
        return f"{self.history} in {self.year}" if self.year else self.history

    @property
    def bare(self) -> str:
        """The denied symptom without its article, to follow "no"."""
        return self.denied.removeprefix("a ").removeprefix("an ")

    @property
    def vitals(self) -> list[tuple[str, str]]:
        """The measured values as (name, value with unit), in the order of the note."""
        vitals = [
            ("temperature", self.temperature),
            ("blood pressure", self.pressure),
            ("pulse", self.pulse),
            ("oxygen saturation", self.saturation),
            ("breathing rate", self.breathing),
        ]
        return [(name, value) for name, value in vitals if value]

    @property
    def combinations(self) -> tuple[tuple[str, str, str], ...]:
        """The (kind, condition, value) triples that decide which split may have the visit."""
        triples = (
            ("drug", self.condition, self.drug),
            ("side", self.condition, self.side),
            ("history", self.condition, self.history),
        )
        return tuple(triple for triple in triples if triple[2])


@lru_cache(maxsize=None)
def home_split(combination: tuple[str, str, str]) -> str:
    """The first split in which a combination may appear.

    Of 16 hash values, two are test, one is valid and the others are train.
    """
    value = zlib.crc32("|".join(combination).encode()) % 16
    if value < 2:
        return "test"
    return "valid" if value == 2 else "train"


def fits_split(visit: Visit, split: str) -> bool:
    """Whether the visit's combinations allow it in the split.

    train has its own combinations alone, valid at least one of its own and none of test, test at
    least one of its own.
    """
    homes = {home_split(combination) for combination in visit.combinations}
    if split == "train":
        return homes == {"train"}
    return split in homes and (split == "test" or "test" not in homes)


def _fill_ranges(rng: random.Random, text: str) -> str:
    """The text with each <a-b> replaced by a number from that range."""
    if "<" not in text:
        return text
    return re.sub(r"<(\d+)-(\d+)>", lambda m: str(rng.randint(int(m[1]), int(m[2]))), text)


def _draw_duration(rng: random.Random, unit: str) -> str:
    low, high = {"hours": (4, 30), "days": (2, 10), "weeks": (2, 9), "months": (2, 14)}[unit]
    return f"{rng.randint(low, high)} {unit}"


def _draw_vitals(rng: random.Random, condition: Condition, fever: bool) -> dict[str, str]:
    """The vital signs that go with the condition's traits; some are not measured."""
    fast = "fast" in condition.traits
    lowsat = "lowsat" in condition.traits
    highbp = "highbp" in condition.traits
    systolic = rng.randint(142, 178) if highbp else rng.randint(104, 146)
    diastolic = rng.randint(88, 104) if highbp else rng.randint(62, 88)
    pulse = rng.randint(58, 92) + (18 if fever or fast else 0)
    saturation = rng.randint(90, 95) if lowsat else rng.randint(95, 99)
    temperature = rng.randint(380, 396) if fever else rng.randint(361, 373)  # tenths of a degree
    saturation_measured = lowsat or rng.random() < 0.4
    breathing = ""
    if rng.random() < (0.6 if fast else 0.15):
        breathing = str(rng.randint(18, 26) if fast else rng.randint(12, 17))
    return {
        "temperature": f"{temperature / 10} C",
        "pressure": f"{systolic}/{diastolic}",
        "pulse": str(pulse),
        "saturation": f"{saturation} %" if saturation_measured else "",
        "breathing": breathing,
    }


def _draw_background(
    rng: random.Random, condition: Condition, age: int, sex: str, drug: str
) -> dict[str, str]:
    """History, regular medicine, allergy and habit.

    They go with the condition and do not forbid the new drug.
    """
    history, medicine, year = _draw_history(rng, condition, age, sex, drug)
    allergy = _draw_allergy(rng, medicine, drug)
    return {
        "history": history,
        "medicine": medicine,
        "year": year,
        "allergy": allergy,
        "habit": _draw_habit(rng),
    }


def _draw_history(
    rng: random.Random, condition: Condition, age: int, sex: str, drug: str
) -> tuple[str, str, str]:
    """A past illness with its regular medicine, or an operation with its year, or neither."""
    if rng.random() >= 0.8:
        return "", "", ""
    history = pick(rng, ILLNESSES)
    illness = HISTORY[history]
    unsuitable = (
        (history in LATE and age < 50)
        or (history == "an enlarged prostate" and sex == "woman")
        or history in condition.contra
        or any(excluded in history for excluded in condition.excluded)
        or illness.avoid & DRUGS[drug].classes
    )
    if unsuitable:
        return "", "", ""
    medicines = [medicine for medicine in illness.medicines if not medicine.startswith(drug)]
    if medicines:
        return history, pick(rng, medicines), ""
    year = rng.randint(max(1990, THIS_YEAR - age + 6), THIS_YEAR - 1)
    return history, "", str(year)


def _draw_allergy(rng: random.Random, medicine: str, drug: str) -> str:
    """An allergy that forbids neither the regular medicine nor the new drug, or none."""
    if rng.random() >= 0.6:
        return ""
    allergy = pick(rng, NAMES)
    forbidden = ALLERGIES[allergy]
    medicine_class = MEDICINE_CLASS.get(medicine.partition(" ")[0], "-")
    if forbidden in DRUGS[drug].classes or forbidden == medicine_class:
        return ""
    return allergy


def _draw_habit(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return f"smokes {rng.randint(3, 30)} cigarettes a day"
    if kind < 0.4:
        return f"drinks {rng.randint(2, 9)} {pick(rng, ('glasses of wine', 'beers'))} a week"
    return "does not smoke" if kind < 0.6 else ""


def _days(number: int) -> str:
    """A number of days in words: from 28 on in weeks."""
    if number >= 28:
        return f"{number // 7} weeks"
    return "1 day" if number == 1 else f"{number} days"


def _draw_visit(rng: random.Random, condition: Condition) -> Visit:
    """A visit of any split. The order of the draws decides the files of the dataset."""
    side = pick(rng, ("left", "right")) if condition.lateral else ""
    sex = condition.sex or pick(rng, ("woman", "man"))
    age = rng.randint(*condition.ages)
    symptoms = tuple(rng.sample(condition.symptoms, pick(rng, (1, 1, 2, 2, 3))))
    denied = pick(rng, condition.denied + condition.symptoms)
    while denied in symptoms:
        denied = pick(rng, condition.denied)
    drug_name = pick(rng, condition.drugs)
    drug = DRUGS[drug_name]
    days = int(pick(rng, drug.days))
    findings = rng.sample(condition.findings, pick(rng, (1, 1, 2)))
    return Visit(
        surname=pick(rng, SURNAMES),
        sex=sex,
        age=age,
        condition=condition.name,
        side=side,
        complaint=pick(rng, condition.complaints).format(side=side),
        duration=_draw_duration(rng, condition.onset),
        symptoms=symptoms,
        denied=denied,
        findings=tuple(_fill_ranges(rng, finding).format(side=side) for finding in findings),
        diagnosis=_fill_ranges(rng, condition.diagnosis).format(side=side),
        excluded=pick(rng, condition.excluded),
        drug=drug_name,
        dose=pick(rng, drug.doses),
        frequency=pick(rng, drug.frequencies),
        length=_days(days),
        test=_fill_ranges(rng, pick(rng, condition.tests)) if rng.random() < 0.85 else "",
        advice=_fill_ranges(rng, pick(rng, condition.advice)) if rng.random() < 0.9 else "",
        follow_up=pick(rng, condition.follow_up),
        **_draw_vitals(rng, condition, "fever" in symptoms),
        **_draw_background(rng, condition, age, sex, drug_name),
    )


def invent_visit(rng: random.Random | int, split: str = "train") -> Visit:
    """An invented visit of the split, from a seed or a running generator.

    All conditions are equally frequent in train, however many of their combinations are held out.
    In the other splits a condition is drawn anew together with its combinations.
    """
    if isinstance(rng, int):
        rng = random.Random(rng)
    condition = pick(rng, CONDITIONS)
    while True:
        drawn = _draw_visit(rng, condition)
        if fits_split(drawn, split):
            return drawn
        if split != "train":
            condition = pick(rng, CONDITIONS)


def listed(items: Sequence[str]) -> str:
    """The items in words: "a", "a and b", "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def dialogue(visit: Visit, rng: random.Random) -> str:
    """The conversation of the visit, a line "Doctor: ..." or "Patient: ..." per turn.

    It has all facts of the note.
    """
    while True:
        talk = _talk(visit, rng)
        if len(talk) <= MAX_PAIRS:
            break
    return "\n".join(f"Doctor: {doctor}\nPatient: {patient}" for doctor, patient in talk)


Say = Callable[[Sequence[str]], str]  # one of the templates, filled with the facts of a visit


def _talk(v: Visit, rng: random.Random) -> list[list[str]]:
    """The conversation as pairs of what the doctor and the patient say."""
    facts = _dialogue_facts(v)

    def say(templates: Sequence[str]) -> str:
        return capital(pick(rng, templates).format_map(facts))

    talk = _opening(rng, say) + _questions(v, rng, say)
    for pair in talk[2:]:
        if rng.random() < 0.12:
            pair[0] = f"{pick(rng, phrases.FILLER)} {pair[0]}"
    talk += _examination(v, rng, say)
    talk.append([say(phrases.DIAGNOSE) + " " + say(phrases.EXCLUDE), say(phrases.ASK_PLAN)])
    return talk + _plan(v, rng, say)


def _dialogue_facts(v: Visit) -> dict[str, str | int]:
    """The facts that the phrases of a dialogue name."""
    return {
        "title": v.title,
        "complaint": v.complaint,
        "duration": v.duration,
        "age": v.age,
        "symptoms": listed(v.symptoms),
        "denied": v.denied,
        "bare": v.bare,
        "past": v.past,
        "medicine": v.medicine,
        "allergy": v.allergy,
        "amount": v.habit.partition(" ")[2],
        "diagnosis": v.diagnosis,
        "excluded": v.excluded,
        "prescription": v.prescription,
        "test": v.test,
        "advice": v.advice,
        "follow_up": v.follow_up,
    }


def _opening(rng: random.Random, say: Say) -> list[list[str]]:
    """The greeting, the complaint with its duration, the age, and sometimes small talk."""
    if rng.random() < 0.7:
        talk = [[say(phrases.GREET), say(phrases.COMPLAIN_LONG)]]
    else:
        talk = [
            [say(phrases.GREET), say(phrases.COMPLAIN)],
            [say(phrases.SINCE), say(phrases.SINCE_REPLY)],
        ]
    if rng.random() < 0.4:
        talk[-1][1] += " " + say(phrases.OWN_AGE)
    else:
        question, answer = pick(rng, phrases.AGE)
        talk.append([say([question]), say([answer])])
    if rng.random() < 0.1:
        talk.insert(1, list(pick(rng, phrases.CHAT)))
    return talk


def _questions(v: Visit, rng: random.Random, say: Say) -> list[list[str]]:
    """Symptoms, history, medicine, allergy and habit in a varying order. Some share a turn."""
    background = _background_questions(v, rng, say)
    symptoms = _symptom_questions(rng, say)
    blocks = symptoms + background if rng.random() < 0.8 else background + symptoms
    return [pair for block in blocks for pair in block]


def _background_questions(v: Visit, rng: random.Random, say: Say) -> list[list[list[str]]]:
    """Blocks of pairs about history, medicine, allergy and habit, in a random order."""
    history_replies: Sequence[str] = phrases.NO_HISTORY
    if v.year:
        history_replies = phrases.OPERATION_REPLY
    elif v.history:
        history_replies = phrases.HISTORY_REPLY
    history = [say(phrases.HISTORY_ASK), say(history_replies)]
    if v.medicine:
        medicine = [say(phrases.MEDICINE_ASK), say(phrases.MEDICINE_REPLY)]
    else:
        medicine = [say(phrases.NO_MEDICINE_ASK), say(phrases.NO_MEDICINE)]
    allergy_replies = phrases.ALLERGY_REPLY if v.allergy else phrases.NO_ALLERGY
    allergy = [say(phrases.ALLERGY_ASK), say(allergy_replies)]
    if rng.random() < 0.6:
        blocks = [[[history[0], f"{history[1]} {medicine[1]}"]], [allergy]]
    else:
        blocks = [[history, medicine], [allergy]]
    if v.habit:
        replies = {"smokes": phrases.SMOKER, "drinks": phrases.DRINKER, "does": phrases.NON_SMOKER}
        verb = v.habit.partition(" ")[0]
        habit = [say(phrases.HABIT_ASK), say(replies[verb])]
        if rng.random() < 0.5:
            blocks[-1] = [[f"{allergy[0]} {habit[0]}", f"{allergy[1]} {habit[1]}"]]
        else:
            blocks.append([habit])
    rng.shuffle(blocks)
    return blocks


def _symptom_questions(rng: random.Random, say: Say) -> list[list[list[str]]]:
    """One block about the symptoms and the denied one, or a block for each."""
    if rng.random() < 0.5:
        ask, reply = say(phrases.SYMPTOMS), say(phrases.SYMPTOMS_REPLY)
        return [[[ask, reply + " " + say(phrases.DENIED_TOO)]]]
    blocks = [
        [[say(phrases.SYMPTOMS), say(phrases.SYMPTOMS_REPLY)]],
        [[say(phrases.DENIED), say(phrases.DENIED_REPLY)]],
    ]
    if rng.random() < 0.3:
        blocks.reverse()
    return blocks


def _examination(v: Visit, rng: random.Random, say: Say) -> list[list[str]]:
    """The measured values and the findings, in one turn or in two."""
    talk = []
    values = [f"{name} {value}" for name, value in v.vitals]
    if rng.random() < 0.3:
        rng.shuffle(values)
    if rng.random() < 0.25:
        talk.append([say(phrases.EXAMINE), say(phrases.READY)])
    measured = f"{pick(rng, phrases.VITALS_OPEN)}{listed(values)}."
    found = " ".join(pick(rng, phrases.FINDING).format(finding=finding) for finding in v.findings)
    if rng.random() < 0.5:
        talk.append([f"{measured} {found}", say(phrases.WORRY)])
    else:
        talk += [[measured, say(phrases.LISTEN)], [found, say(phrases.WORRY)]]
    return talk


def _plan(v: Visit, rng: random.Random, say: Say) -> list[list[str]]:
    """Prescription, test, advice and the next visit, in two turns."""
    extra = []
    if v.test:
        extra.append(say(phrases.TEST))
    if v.advice:
        extra.append(say(phrases.ADVISE))
    if rng.random() < 0.3:
        extra.reverse()
    plan = [say(phrases.PRESCRIBE), *extra, say(phrases.RETURN)]
    first_turn = pick(rng, range(1, len(plan)))  # its number of sentences
    return [
        [" ".join(plan[:first_turn]), say(phrases.ACCEPT)],
        [" ".join(plan[first_turn:]), say(phrases.BYE)],
    ]


def note(visit: Visit) -> str:
    """The SOAP note of the visit.

    Its wording is always the same, so that a tiny model has only the facts to find.
    """
    v = visit
    history = f"History of {v.past}" if v.history else "No past illnesses"
    medicine = f"takes {v.medicine}" if v.medicine else "no regular medicine"
    allergy = f"Allergic to {v.allergy}" if v.allergy else "No known allergies"
    subjective = (
        f"{v.age}-year-old {v.sex} with {v.complaint} for {v.duration}. "
        f"Reports {listed(v.symptoms)}, denies {v.denied}. {history}, {medicine}. "
        f"{allergy}{', ' if v.habit else ''}{v.habit}."
    )
    vitals = ", ".join(f"{name} {value}" for name, value in v.vitals)
    objective = f"{capital(vitals)}. On exam {listed(v.findings)}."
    assessment = f"Diagnosis of {v.diagnosis}, no sign of {v.excluded}."
    plan = [f"Start {v.prescription}."]
    if v.test:
        plan.append(f"Arrange {v.test}.")
    if v.advice:
        plan.append(f"Advised to {v.advice}.")
    plan.append(f"Follow-up in {v.follow_up}.")
    return f"S: {subjective}\nO: {objective}\nA: {assessment}\nP: {' '.join(plan)}"


def _seed(*parts: str | int) -> int:
    """The same integer for the same parts, in every process."""
    return zlib.crc32("|".join(map(str, parts)).encode())


def visits(split: str) -> list[Visit]:
    """The visits behind one file of the dataset."""
    return [
        invent_visit(_seed(split, "visit", number), split) for number in range(1, SPLITS[split] + 1)
    ]


def rows(split: str) -> list[dict[str, str]]:
    """The rows of one file of the dataset."""
    return [
        {
            "id": f"{split}-{number:04d}",
            "dialogue": dialogue(v, random.Random(_seed(split, "dialogue", number))),
            "soap": note(v),
        }
        for number, v in enumerate(visits(split), start=1)
    ]
