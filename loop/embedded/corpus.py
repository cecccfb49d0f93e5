"""The pre-training corpus of the tiny base: chats with a clinic's assistant.

They teach the clinic's language and, above all, copying facts out of a dialogue. Every visit is a
train visit. No row has a SOAP note, one of its headings or the SOAP request: these are left for
fine-tuning. `python -m loop.embedded pretrain` writes it.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from ..data.soap import SOAP
from . import clinic
from .clinic import Visit, capital, listed, pick
from .conditions import DRUGS, HISTORY, SURNAMES

CHUNK = 500  # rows per unit of work
Message = dict[str, str]

SYSTEMS = (
    "You are a helpful assistant.",
    "You are an assistant in a medical practice.",
    "You help a doctor with paperwork.",
    "You read conversations carefully.",
    "Answer briefly and only with what was said.",
    "You are a medical secretary.",
    "You work in a clinic. You write clear and short texts.",
    "You copy facts exactly.",
    SOAP.system,
)

# (fact, questions, answers, answers when the fact does not come up). Without the last ones the
# question is asked only where the fact comes up.
QUESTIONS = (
    (
        "prescription",
        (
            "Which medicine was prescribed?",
            "What does the doctor prescribe?",
            "Which new medicine will the patient take?",
            "What is the prescription?",
        ),
        ("{prescription}", "The doctor prescribed {prescription}.", "Start {prescription}."),
        (),
    ),
    (
        "drug",
        ("What is the name of the new drug?", "Which drug is new?"),
        ("{drug}", "It is {drug}."),
        (),
    ),
    (
        "dose",
        ("What is the dose of {drug}?", "How much {drug} is taken each time?"),
        ("{dose}", "{drug} {dose}"),
        (),
    ),
    (
        "frequency",
        ("How often is {drug} taken?", "How often should the patient take {drug}?"),
        ("{frequency}", "{drug} {dose} {frequency}"),
        (),
    ),
    (
        "length",
        ("For how long is {drug} taken?", "How long does the treatment last?"),
        ("for {length}", "{length}"),
        (),
    ),
    (
        "pressure",
        ("What was the blood pressure?", "Which blood pressure was measured?", "Blood pressure?"),
        ("{pressure}", "The blood pressure was {pressure}.", "blood pressure {pressure}"),
        (),
    ),
    (
        "temperature",
        ("What was the temperature?", "How high was the temperature?", "Temperature?"),
        ("{temperature}", "The temperature was {temperature}.", "temperature {temperature}"),
        (),
    ),
    (
        "pulse",
        ("What was the pulse?", "How fast was the pulse?", "Pulse?"),
        ("{pulse}", "The pulse was {pulse}.", "pulse {pulse}"),
        (),
    ),
    (
        "saturation",
        ("What was the oxygen saturation?", "Oxygen saturation?"),
        ("{saturation}", "oxygen saturation {saturation}"),
        ("It was not measured.",),
    ),
    (
        "breathing",
        ("What was the breathing rate?", "Breathing rate?"),
        ("{breathing}", "breathing rate {breathing}"),
        ("It was not measured.",),
    ),
    (
        "vitals",
        ("Which values were measured?", "List the vital signs.", "What did the doctor measure?"),
        ("{vitals}", "{vitals_and}", "The values were {vitals}."),
        (),
    ),
    (
        "findings",
        ("What did the examination find?", "What did the doctor see?", "Which findings are there?"),
        ("{findings}", "On exam {findings}.", "The doctor found that {findings}."),
        (),
    ),
    (
        "side",
        ("Which side is affected?", "Left or right?", "Is it the left or the right side?"),
        ("{side}", "the {side} side", "It is the {side} side."),
        (),
    ),
    (
        "complaint",
        (
            "Why did the patient come?",
            "What is the main complaint?",
            "What brought the patient in?",
        ),
        ("{complaint}", "The patient has {complaint}.", "{complaint} for {duration}"),
        (),
    ),
    (
        "duration",
        (
            "How long has it lasted?",
            "Since when does the patient have it?",
            "How long has the patient been ill?",
        ),
        ("for {duration}", "{duration}", "{complaint} for {duration}"),
        (),
    ),
    (
        "symptoms",
        (
            "Which other symptoms are there?",
            "What else does the patient feel?",
            "List the other symptoms.",
        ),
        ("{symptoms}", "The patient reports {symptoms}.", "{lines}"),
        (),
    ),
    (
        "denied",
        (
            "Which symptom is denied?",
            "What does the patient not have?",
            "What was asked for but is absent?",
        ),
        ("{denied}", "The patient denies {denied}.", "There is no {bare}."),
        (),
    ),
    (
        "age",
        ("How old is the patient?", "What is the patient's age?", "Age?"),
        ("{age}", "{age} years", "a {age}-year-old {sex}"),
        (),
    ),
    (
        "sex",
        ("Is the patient a man or a woman?", "Who is the patient?"),
        ("a {sex}", "a {age}-year-old {sex}"),
        (),
    ),
    ("title", ("What is the patient called?", "What is the patient's name?"), ("{title}",), ()),
    (
        "past",
        (
            "Which past illness is there?",
            "What is the medical history?",
            "Which earlier illness or operation is known?",
        ),
        ("{past}", "a history of {past}", "The patient has a history of {past}."),
        ("none", "No past illness is known."),
    ),
    (
        "medicine",
        (
            "Which medicine does the patient already take?",
            "What is the regular medicine?",
            "What is taken regularly?",
        ),
        ("{medicine}", "The patient takes {medicine}."),
        ("none", "The patient takes no regular medicine."),
    ),
    (
        "allergy",
        (
            "Which allergy does the patient have?",
            "Is there an allergy?",
            "What is the patient allergic to?",
        ),
        ("{allergy}", "The patient is allergic to {allergy}."),
        ("none", "There are no known allergies."),
    ),
    (
        "habit",
        ("Does the patient smoke or drink?", "What about smoking and alcohol?"),
        ("{habit}", "The patient {habit}."),
        ("It was not said.",),
    ),
    (
        "diagnosis",
        ("What is the diagnosis?", "What does the doctor think it is?", "Which illness was found?"),
        ("{diagnosis}", "a diagnosis of {diagnosis}", "The diagnosis is {diagnosis}."),
        (),
    ),
    (
        "excluded",
        ("What does it not look like?", "What was ruled out?", "Of what is there no sign?"),
        ("{excluded}", "There is no sign of {excluded}."),
        (),
    ),
    (
        "test",
        ("Which test is planned?", "What will be arranged?", "What did the doctor order?"),
        ("{test}", "The doctor will arrange {test}."),
        ("none", "No test is planned."),
    ),
    (
        "advice",
        ("What is the advice?", "What should the patient do at home?"),
        ("{advice}", "The patient is advised to {advice}."),
        ("none",),
    ),
    (
        "follow_up",
        ("When is the next visit?", "When should the patient come back?", "When is the follow-up?"),
        ("in {follow_up}", "Follow-up in {follow_up}.", "The patient returns in {follow_up}."),
        (),
    ),
)

STORY = (
    "The {age}-year-old {sex} has had {complaint} for {duration}.",
    "{title}, {age} years old, came with {complaint} for {duration}.",
    "The patient, a {sex} of {age} years, reports {complaint} for {duration}.",
    "{title} is {age} and has had {complaint} for {duration}.",
    "A {age}-year-old {sex} came because of {complaint}, for {duration} now.",
)
STORY_MORE = (
    "The patient also reports {symptoms} and denies {denied}.",
    "There is also {symptoms}, but no {bare}.",
    "Other symptoms: {symptoms}. The patient denies {denied}.",
    "Reported are {symptoms}. Denied is {denied}.",
)
PAST = (
    "There is a history of {past}.",
    "The patient has a history of {past}.",
    "{past_capital} is known.",
    "Known is {past}.",
)
NO_PAST = (
    "There are no past illnesses.",
    "No past illness is known.",
    "The patient was healthy before.",
)
TAKES = (
    "The patient takes {medicine}.",
    "The regular medicine is {medicine}.",
    "Regularly taken is {medicine}.",
)
TAKES_NONE = (
    "There is no regular medicine.",
    "No medicine is taken regularly.",
    "The patient takes no regular medicine.",
)
ALLERGIC = (
    "The patient is allergic to {allergy}.",
    "There is an allergy to {allergy}.",
    "Known allergy: {allergy}.",
)
ALLERGIC_NOT = (
    "There are no known allergies.",
    "The patient has no known allergies.",
    "No allergy is known.",
)
HABIT = ("The patient {habit}.", "The {sex} {habit}.", "{title} {habit}.")
FOUND_VALUES = (
    "The values were {vitals}.",
    "Measured: {vitals}.",
    "The doctor measured {vitals_and}.",
    "We found {vitals_and}.",
)
FOUND = (
    "On exam, {findings}.",
    "The examination shows that {findings}.",
    "The doctor found that {findings}.",
    "It was seen that {findings}.",
)
THINKS = (
    "The diagnosis is {diagnosis}. There is no sign of {excluded}.",
    "The doctor found {diagnosis} and no sign of {excluded}.",
    "A diagnosis of {diagnosis} was made, with no sign of {excluded}.",
    "It is {diagnosis}, without a sign of {excluded}.",
)
NEXT_DRUG = (
    "The patient starts {prescription}.",
    "The doctor prescribed {prescription}.",
    "The treatment is {prescription}.",
    "We start {prescription}.",
)
NEXT_TEST = (
    "The doctor will arrange {test}.",
    "We arrange {test}.",
    "{test_capital} is planned.",
    "Planned is {test}.",
)
NEXT_ADVICE = (
    "The patient was advised to {advice}.",
    "The patient should {advice}.",
    "The advice is to {advice}.",
)
NEXT_VISIT = (
    "The follow-up is in {follow_up}.",
    "The next visit is in {follow_up}.",
    "The patient returns in {follow_up}.",
    "A follow-up was agreed in {follow_up}.",
)

# Part of a visit: (its names in an instruction, its labels in a report).
PARTS = {
    "story": (
        ("what the patient said", "the patient's story", "what was told"),
        ("Story", "Told", "History", "Background"),
    ),
    "found": (
        ("what the examination found", "what was measured and seen", "the findings"),
        ("Findings", "Examination", "Measured", "Seen"),
    ),
    "thinks": (
        ("what the doctor thinks", "the doctor's conclusion", "what the illness is"),
        ("Opinion", "Conclusion", "Diagnosis", "Result"),
    ),
    "next": (
        ("what happens next", "the treatment", "what was agreed"),
        ("Treatment", "Next", "To do", "Agreed"),
    ),
}
ASK_PART = (
    "Write down {part}.",
    "Tell me {part}.",
    "Summarize {part}.",
    "In a short paragraph: {part}.",
    "From this conversation, give {part}.",
    "Describe {part} in a few sentences.",
    "Report {part}. State only what was said.",
    "Note {part} and nothing else.",
)
ASK_REPORT = (
    "Write a report of this conversation under the headings {labels}, in plain text.",
    "Report this visit with the labels {labels}.",
    "Sort the facts of this conversation under {labels}.",
    "Use the headings {labels} for a short report. State only what was said.",
    "Write short paragraphs called {labels}.",
    "Summarize the conversation under the headings {labels}, without markdown.",
)
ONE_SENTENCE = (
    "A {age}-year-old {sex} with {complaint} for {duration} has {diagnosis} "
    "and starts {prescription}.",
    "{title} ({age}) has {diagnosis} and gets {prescription}, with a visit in {follow_up}.",
    "Because of {complaint} for {duration}, {title} takes {prescription}.",
    "The {sex} of {age} years reports {symptoms}, denies {denied} and has {diagnosis}.",
)
ASK_LETTER = (
    "Write a letter to the family doctor about this visit.",
    "Write to the family doctor what happened.",
    "Draft a letter about this patient.",
    "Turn this conversation into a letter to a colleague.",
    "Please write the doctor's letter.",
)
ASK_HANDOVER = (
    "Write the handover for the nurse.",
    "Summarize this visit for the nurse.",
    "What must the next nurse know?",
    "Write a handover in prose.",
    "Tell the team about this patient.",
    "Turn this conversation into one paragraph.",
)
ASK_SENTENCE = (
    "Summarize this conversation in one sentence.",
    "Write a one-sentence summary.",
    "Sum up the visit in a single sentence.",
    "What happened, in one sentence?",
    "Give the shortest summary of this visit.",
)
ASK_DRUGS = (
    "List all medicines of this patient.",
    "Make a list of the drugs.",
    "Which medicines, old and new?",
    "Write the list of medicines.",
)
ASK_FIELDS = (
    "Fill in these fields: {labels}.",
    "Write a fact sheet with {labels}.",
    "Extract {labels} from this conversation.",
    "Give me {labels}, one per line.",
    "Copy these facts from the conversation: {labels}.",
    "Make a list with {labels}.",
)
ASK_JSON = (
    "Write {labels} as JSON.",
    "Give me JSON with the keys {labels}.",
    "Extract {labels} as a JSON object.",
    "Return JSON: {labels}.",
)
ASK_QUESTION = (
    "{question}",
    "{question}",
    "Answer the question: {question}",
    "Read the conversation. {question}",
    "Answer from the conversation. {question}",
)
ASK_TALK = (
    "Write the conversation that belongs to these facts.",
    "Turn these facts into a conversation of doctor and patient.",
    "Invent the visit behind this fact sheet.",
    "What did doctor and patient say? Use these facts.",
    "Make a dialogue from these facts.",
)
ASK_ANY_TALK = (
    "Write a conversation between a doctor and a patient.",
    "Invent a visit to the doctor.",
    "Show me a dialogue from a clinic.",
    "Write a talk of doctor and patient about {diagnosis}.",
    "How does a visit to the doctor go?",
)
ASK_REPEAT = (
    "Repeat: {text}",
    "Say again: {text}",
    "Copy this: {text}",
    "Write exactly this: {text}",
    "Repeat the line.\n\n{text}",
)
SYLLABLES = tuple(
    a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or")
)

FIELDS = {
    "title": ("Name", "Patient"),
    "age": ("Age",),
    "sex": ("Sex",),
    "complaint": ("Complaint", "Reason", "Main problem"),
    "duration": ("Duration", "Since"),
    "side": ("Side",),
    "symptoms": ("Symptoms", "Other symptoms"),
    "denied": ("Denied", "Not present"),
    "past": ("Past illness", "Known illness"),
    "medicine": ("Regular medicine", "Takes"),
    "allergy": ("Allergy", "Allergic to"),
    "habit": ("Habits", "Lifestyle"),
    "temperature": ("Temperature",),
    "pressure": ("Blood pressure",),
    "pulse": ("Pulse",),
    "saturation": ("Oxygen saturation",),
    "breathing": ("Breathing rate",),
    "findings": ("Findings", "Exam"),
    "diagnosis": ("Diagnosis", "Illness"),
    "excluded": ("Ruled out", "No sign of"),
    "drug": ("New drug",),
    "dose": ("Dose",),
    "frequency": ("How often",),
    "length": ("Course", "How long"),
    "prescription": ("Prescription", "New medicine"),
    "test": ("Test", "Arranged"),
    "advice": ("Advice",),
    "follow_up": ("Next visit", "Return"),
}
SHEET = tuple(key for key in FIELDS if key not in ("drug", "dose", "frequency", "length"))


def template_facts(v: Visit) -> dict[str, str]:
    """All facts of a visit as texts, for templates and fields; "" where one does not come up."""
    vitals = [f"{name} {value}" for name, value in v.vitals]
    return {
        "title": v.title,
        "age": str(v.age),
        "sex": v.sex,
        "complaint": v.complaint,
        "duration": v.duration,
        "side": v.side,
        "symptoms": listed(v.symptoms),
        "lines": "\n".join(v.symptoms),
        "denied": v.denied,
        "bare": v.bare,
        "past": v.past,
        "past_capital": capital(v.past),
        "medicine": v.medicine,
        "allergy": v.allergy,
        "habit": v.habit,
        "temperature": v.temperature,
        "pressure": v.pressure,
        "pulse": v.pulse,
        "saturation": v.saturation,
        "breathing": v.breathing,
        "vitals": ", ".join(vitals),
        "vitals_and": listed(vitals),
        "findings": listed(v.findings),
        "diagnosis": v.diagnosis,
        "excluded": v.excluded,
        "drug": v.drug,
        "dose": v.dose,
        "frequency": v.frequency,
        "length": v.length,
        "prescription": v.prescription,
        "test": v.test,
        "test_capital": capital(v.test),
        "advice": v.advice,
        "follow_up": v.follow_up,
    }


class Scribe:
    """Writes every kind of text about one visit. A task is an (instruction, answer)."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.visit = clinic.invent_visit(rng)
        self.facts = template_facts(self.visit)

    def fill(self, templates: Sequence[str]) -> str:
        """One of the templates with the facts of the visit."""
        return pick(self.rng, templates).format_map(self.facts)

    def sentences(self, *choices: Sequence[str]) -> str:
        """A sentence from each of the lists of templates; an empty list gives none."""
        return " ".join(capital(self.fill(templates)) for templates in choices if templates)

    def dialogue(self) -> str:
        return clinic.dialogue(self.visit, self.rng)

    def part(self, name: str) -> str:
        """One of the PARTS as a short paragraph."""
        f = self.facts
        if name == "story":
            return self.sentences(
                STORY,
                STORY_MORE,
                PAST if f["past"] else NO_PAST,
                TAKES if f["medicine"] else TAKES_NONE,
                ALLERGIC if f["allergy"] else ALLERGIC_NOT,
                HABIT if f["habit"] else (),
            )
        if name == "found":
            return self.sentences(FOUND_VALUES, FOUND)
        if name == "thinks":
            return self.sentences(THINKS)
        return self.sentences(
            NEXT_DRUG,
            NEXT_TEST if f["test"] else (),
            NEXT_ADVICE if f["advice"] else (),
            NEXT_VISIT,
        )

    def question(self) -> tuple[str, str]:
        """A question about the visit and its answer."""
        while True:
            fact, questions, answers, missing = pick(self.rng, QUESTIONS)
            if not self.facts.get(fact):
                answers = missing
            if answers:
                return self.fill(questions), self.fill(answers)

    def ask_part(self, name: str) -> str:
        """The instruction to write one of the PARTS."""
        return pick(self.rng, ASK_PART).format(part=pick(self.rng, PARTS[name][0]))

    def part_task(self) -> tuple[str, str]:
        """One of the parts."""
        name = pick(self.rng, tuple(PARTS))
        return self.ask_part(name), self.part(name)

    def report(self) -> tuple[str, str]:
        """Three or four parts under the labels that the instruction names, in its order."""
        names = list(PARTS)
        if self.rng.random() < 0.3:
            names = self.rng.sample(names, 3)
        labels = [pick(self.rng, PARTS[name][1]) for name in names]
        label_list = listed([f"{label}:" for label in labels])
        instruction = pick(self.rng, ASK_REPORT).format(labels=label_list)
        lines = [f"{label}: {self.part(name)}" for label, name in zip(labels, names, strict=True)]
        return instruction, "\n".join(lines)

    def letter(self) -> tuple[str, str]:
        """All parts between a greeting and a close."""
        surname = pick(self.rng, SURNAMES)
        greeting = pick(self.rng, ("Dear colleague,", "Dear doctor,", f"Dear Dr {surname},"))
        close = pick(self.rng, ("Kind regards", "Best wishes", "With regards", "Yours"))
        instruction = pick(self.rng, ASK_LETTER)
        return instruction, "\n".join([greeting, *map(self.part, PARTS), close])

    def handover(self) -> tuple[str, str]:
        """All parts as one paragraph."""
        return pick(self.rng, ASK_HANDOVER), " ".join(map(self.part, PARTS))

    def sentence(self) -> tuple[str, str]:
        """The visit in one sentence."""
        return pick(self.rng, ASK_SENTENCE), self.fill(ONE_SENTENCE)

    def drugs(self) -> tuple[str, str]:
        """The regular medicine and the new one."""
        regular = self.facts["medicine"] or "none"
        answer = f"Regular: {regular}\nNew: {self.facts['prescription']}"
        return pick(self.rng, ASK_DRUGS), answer

    def _draw_fields(self) -> list[tuple[str, str]]:
        """(label, value) of three to eight fields."""
        keys = self.rng.sample(tuple(FIELDS), self.rng.randint(3, 8))
        return [(pick(self.rng, FIELDS[key]), self.facts[key] or "none") for key in keys]

    def fields(self) -> tuple[str, str]:
        """Some fields, a line each."""
        fields = self._draw_fields()
        labels = listed([label for label, _ in fields])
        answer = "\n".join(f"{label}: {value}" for label, value in fields)
        return pick(self.rng, ASK_FIELDS).format(labels=labels), answer

    def fields_as_json(self) -> tuple[str, str]:
        """Some fields as a JSON object."""
        fields = self._draw_fields()
        labels = listed([label for label, _ in fields])
        return pick(self.rng, ASK_JSON).format(labels=labels), json.dumps(dict(fields))

    def sheet(self) -> str:
        """All facts that come up, a line each."""
        keys = [key for key in SHEET if self.facts[key]]
        return "\n".join(f"{pick(self.rng, FIELDS[key])}: {self.facts[key]}" for key in keys)


# The long documents come often, because they are the closest to a note.
DOCUMENTS: tuple[Callable[[Scribe], tuple[str, str]], ...] = (
    Scribe.report,
    Scribe.report,
    Scribe.report,
    Scribe.letter,
    Scribe.handover,
    Scribe.part_task,
    Scribe.part_task,
    Scribe.sentence,
    Scribe.drugs,
    Scribe.fields,
    Scribe.fields,
    Scribe.fields_as_json,
)


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _interview(rng: random.Random) -> list[Message]:
    """A dialogue and several questions about it.

    The first question stands before the dialogue, as the SOAP request does.
    """
    scribe = Scribe(rng)
    turns: list[Message] = []
    # At most one answer is a paragraph, so that rows stay within 700 tokens.
    paragraph = rng.randrange(9)
    for number in range(rng.randint(4, 8)):
        question, answer = scribe.part_task() if number == paragraph else scribe.question()
        if number == 0:
            question = pick(rng, ASK_QUESTION).format(question=question)
            question = f"{question}\n\n{scribe.dialogue()}"
        turns += _turn(question, answer)
    return turns


def _documents(rng: random.Random) -> list[Message]:
    """A dialogue and a document with its facts, at times with a question after it."""
    scribe = Scribe(rng)
    instruction, text = pick(rng, DOCUMENTS)(scribe)
    turns = _turn(f"{instruction}\n\n{scribe.dialogue()}", text)
    for _ in range(pick(rng, (0, 0, 1, 2))):
        turns += _turn(*scribe.question())
    return turns


def _parts(rng: random.Random) -> list[Message]:
    """A dialogue and its parts, asked for one after the other."""
    scribe = Scribe(rng)
    turns: list[Message] = []
    names = list(PARTS)
    if rng.random() < 0.3:
        names = rng.sample(names, 3)
    for name in names:
        instruction = scribe.ask_part(name)
        if not turns:
            instruction = f"{instruction}\n\n{scribe.dialogue()}"
        turns += _turn(instruction, scribe.part(name))
    return turns


def _from_sheet(rng: random.Random) -> list[Message]:
    """A fact sheet, and the dialogue or a document with its facts."""
    scribe = Scribe(rng)
    if rng.random() < 0.5:
        return _turn(f"{pick(rng, ASK_TALK)}\n\n{scribe.sheet()}", scribe.dialogue())
    instruction, text = pick(rng, DOCUMENTS)(scribe)
    instruction = instruction.replace("conversation", "fact sheet")
    return _turn(f"{instruction}\n\n{scribe.sheet()}", text)


def _any_talk(rng: random.Random) -> list[Message]:
    """A dialogue without facts given."""
    scribe = Scribe(rng)
    return _turn(scribe.fill(ASK_ANY_TALK), scribe.dialogue())


def _word(rng: random.Random, common: list[str]) -> str:
    """A word to be copied: a changed common word, a made-up word, a name or a number."""
    kind = rng.random()
    if kind < 0.6:
        # With a capital or without its beginning: notes need such pieces of words, and no other
        # row has them.
        word = pick(rng, common)
        if rng.random() < 0.7:
            return word.capitalize()
        return word[rng.randint(1, 4) :] or word
    if kind < 0.65:
        return "".join(pick(rng, SYLLABLES) for _ in range(rng.randint(1, 4)))
    if kind < 0.75:
        return pick(rng, tuple(DRUGS))
    if kind < 0.8:
        return pick(rng, tuple(HISTORY))
    if kind < 0.85:
        return pick(rng, SURNAMES)
    return pick(
        rng,
        (
            str(rng.randint(0, 999)),
            f"{rng.randint(90, 180)}/{rng.randint(50, 110)}",
            f"{rng.randint(1, 999)} mg",
            f"{rng.randint(340, 420) / 10} C",
            f"{rng.randint(2, 60)} days",
            f"{rng.randint(50, 100)} %",
        ),
    )


def _copy(rng: random.Random) -> list[Message]:
    """Lines of random words to be repeated."""
    words: set[str] = set()
    for message in _documents(rng):
        words.update(re.findall("[A-Za-z]+", message["content"]))
    common = sorted(words)
    turns: list[Message] = []
    for _ in range(rng.randint(2, 5)):
        text = " ".join(_word(rng, common) for _ in range(rng.randint(2, 14)))
        turns += _turn(pick(rng, ASK_REPEAT).format(text=text), text)
    return turns


def _lookup(rng: random.Random) -> list[Message]:
    """A random list of drugs and doses, asked about in both directions."""
    names = rng.sample(tuple(DRUGS), rng.randint(4, 9))
    numbers = rng.sample(range(1, 1000), len(names))
    doses = [f"{number} {pick(rng, ('mg', 'mcg', 'g', 'drops'))}" for number in numbers]
    table = "\n".join(f"{name}: {dose}" for name, dose in zip(names, doses, strict=True))
    turns: list[Message] = []
    for i in rng.sample(range(len(names)), min(len(names), rng.randint(3, 6))):
        if rng.random() < 0.5:
            question, answer = f"What is the dose of {names[i]}?", doses[i]
        else:
            question, answer = f"Which drug has a dose of {doses[i]}?", names[i]
        if not turns:
            question = f"{question}\n\n{table}"
        turns += _turn(question, answer)
    return turns


# The kinds of rows, each with its percentage of the corpus.
KINDS = (
    (_documents, 38),
    (_interview, 22),
    (_parts, 16),
    (_from_sheet, 8),
    (_any_talk, 3),
    (_copy, 10),
    (_lookup, 3),
)
ROW_KINDS = tuple(kind for kind, percent in KINDS for _ in range(percent))


def messages(seed: int, number: int) -> list[Message]:
    """The chat of one row of the corpus. It depends on the seed and the row's number alone."""
    rng = random.Random(seed << 32 | number)
    chat: list[Message] = []
    if rng.random() < 0.65:
        chat.append({"role": "system", "content": pick(rng, SYSTEMS)})
    return chat + pick(rng, ROW_KINDS)(rng)


def _lines(seed: int, numbers: range) -> str:
    """The rows of these numbers as lines of JSON."""
    rows = [
        {"id": f"pretrain-{number:07d}", "messages": messages(seed, number)} for number in numbers
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, count: int, seed: int, workers: int) -> None:
    """Writes a corpus of `count` rows. The file does not depend on the number of workers."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with path.open("w", encoding="utf-8", newline="\n") as file, Pool(workers) as pool:
        file.writelines(pool.imap(partial(_lines, seed), chunks))
