"""Whether a dialogue supports what a note states, contradicts it, or says nothing of it."""

import bisect
import functools
import os.path
from collections import Counter
from typing import NamedTuple

from .body import same_region
from .claims import Usage, read_claims
from .conditions import EXAMS_OF, KIND_OF, SCATTERED
from .context import AFFIRMED, DENIED, ENDED, FAMILY, FORMER, NORMAL, PATIENT, POSSIBLE
from .drugs import same_drug
from .quantities import TO_MG, UNITS, Amount
from .statements import MEASURES, Document, Statement

SUPPORTED, CONTRADICTED, NOT_SAID = "supported", "contradicted", "not said"
CRITICAL = frozenset(("dose", "drug", "allergy", "side", "diagnosis"))
KINDS = {
    "dose": "doses",
    "duration": "durations",
    "age": "ages",
    "frequency": "how often",
    "ratio": "120/80 and the like",
    "number": "numbers, measurements",
    "date": "dates",
    "drug": "drugs",
    "side": "left and right",
    "diagnosis": "diagnoses",
    "symptom": "symptoms",
    "finding": "findings",
    "allergy": "allergies",
    "habit": "tobacco, alcohol, drugs",
    "action": "continue, stop, start",
    "claim": "affirmed or denied in other words",
}
_GENERAL = ("cancer", "tumor")  # they support no special one
_MEASURE_REACH = 8  # items between a number and what it measures
_ACTION_REACH = 14  # items between a drug and what is done with it
_TAKE = frozenset("take taking takes took use using used more on off".split())
_SHOWN = {DENIED: "no ", POSSIBLE: "perhaps ", FORMER: "formerly ", ENDED: "formerly "}
_ALIKE = dict.fromkeys((FORMER, ENDED), (AFFIRMED, FORMER, ENDED)) | {AFFIRMED: (AFFIRMED, FORMER)}
_ABUSES = {"alcohol": "alcohol abuse", "drugs": "substance abuse"}
_OPPOSITE = {AFFIRMED: (DENIED, ENDED), DENIED: (AFFIRMED,), FORMER: (DENIED,)}
_CONDITIONS = ("diagnosis", "symptom", "finding")
_COMMON_NAMES = frozenset("disease disorder syndrome chronic difficulty problem".split())
_BEYOND = 0.4  # what a word counts beyond the clause, where one within counts 1
_TELLS_NOTHING = frozenset(
    """the and you your that was has have had for not with she her his him are any can but patient
    okay yeah all right been just know like then there they this from""".split()
)
_MOST_RIVALS = 40  # mentions of one thing that are weighed, so that the time stays linear
_SPOKEN_REACH, _WRITTEN_REACH = 12, 8  # items around a mention that tell which one is meant
# How much nearer a mention that contradicts must be than one that supports, chosen on the training
# splits; a word that stands once in the text counts 1.
_MARGINS = {"side": 0.1, "duration": 1.0, "frequency": 1.0}
_MARGIN = 0.5
_SAME_PART = 0.3  # for a mention of the same part, not of one that it belongs to


Key = tuple[str, str, str, str, str]


def key_of(s: Statement) -> Key:
    """What makes two statements of a text one."""
    return s.kind, s.value, s.of, s.polarity, s.subject


class Verdict(NamedTuple):
    """What another text says of a statement."""

    statement: Statement
    verdict: str  # supported, contradicted or not said
    place: tuple[int, int] | None  # where the other text speaks of it: text[place[0]:place[1]]
    is_broader: bool = False  # supported by something more general: an elaboration

    @property
    def title(self) -> str:
        """What was understood, such as "40 mg of prednisone" or "no fever"."""
        s = self.statement
        value = _SHOWN.get(s.polarity, "") + s.value
        if s.of:
            value += f" {s.of}" if s.kind == "side" else f" of {s.of}"
        return f"{value} (family)" if s.subject == FAMILY else value

    @property
    def is_critical(self) -> bool:
        """Whether it may harm: a wrong or unsaid dose, drug, allergy, side, diagnosis or denial."""
        wrong = self.verdict != SUPPORTED
        return wrong and (self.statement.kind in CRITICAL or self.statement.polarity == DENIED)


class Comparison(NamedTuple):
    """The statements of a note and of its dialogue, each with what the other text says of it."""

    note: list[Verdict]
    dialogue: list[Verdict]


def compare(dialogue: str, note: str) -> Comparison:
    """Each statement of the note with its place in the dialogue, and the reverse.

    What a dialogue only asks or considers is no statement of it. Any text can be compared; the time
    is linear in the texts.
    """
    return Comparison(check(dialogue, note), read(note).verdicts(read(dialogue).document))


def check(dialogue: str, note: str) -> list[Verdict]:
    """Each statement of the note, with its place in the dialogue."""
    spoken, written = read(dialogue), read(note).document
    return spoken.verdicts(written) + spoken.claims(written)


def distinct(found: list[Verdict]) -> list[Verdict]:
    """The first of each thing that a text states, and the first of those that are wrong."""
    first: dict[tuple, Verdict] = {}
    for verdict in found:
        s = verdict.statement
        first.setdefault((*key_of(s), verdict.verdict), verdict)
    return list(first.values())


class Index:
    """The statements of a document by what they can support."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.by_kind: dict[str, list[Statement]] = {}
        self.conditions: dict[str, list[Statement]] = {}
        for statement in document.statements:
            self.by_kind.setdefault(statement.kind, []).append(statement)
            if statement.kind in (*_CONDITIONS, "weak"):
                name = statement.value
                while name:
                    self.conditions.setdefault(name, []).append(statement)
                    name = KIND_OF.get(name, "")
        self.drug_places: dict[str, list[int]] = {}
        self.numbers: dict[float, list[int]] = {}
        for i, item in enumerate(document.items):
            if item.number is not None:
                self.numbers.setdefault(item.number, []).append(i)
        self.places_of_word: dict[str, list[int]] = {}
        for i, word in enumerate(document.words):
            self.places_of_word.setdefault(word, []).append(i)
        self.amounts = [o for o in document.statements if o.amount]
        self.measures = {MEASURES[word] for word in document.words if word in MEASURES}
        self.normal = document.normal_exams()
        for statement in document.statements:
            if statement.polarity == DENIED and statement.subject != FAMILY:
                self.normal.update(EXAMS_OF.get(statement.value, ())[:1])
        self.usage = Usage(document.items, document.words, document.context)
        self.cache: dict[Key, Verdict] = {}
        self.rivals: dict[Key, tuple[list[Statement], list[Statement]]] = {}
        self.surroundings: dict[int, dict[str, float]] = {}
        self.num_places = Counter(document.words) + Counter(document.names.values())

    def verdicts(self, document: Document) -> list[Verdict]:
        """What this text says of each statement of another."""
        return [
            self._weigh(self.judge(statement), document)
            for statement in document.statements
            if document.tells(statement)
        ]

    def claims(self, document: Document) -> list[Verdict]:
        """What this text says of the other's claims whose words it uses."""
        found = []
        for claim in read_claims(document.items, document.words, document.context):
            words = [document.words[i] for i in claim.items]
            against = self.usage.against(claim.polarity, words)
            if against is None:
                continue
            first, last = claim.items[0], claim.items[-1]
            statement = Statement(
                "claim", " ".join(words), "", claim.polarity, document.context.subject[first],
                document.items[first].start, document.items[last].end, first,
            )  # fmt: skip
            if against < 0:
                found.append(Verdict(statement, SUPPORTED, None))
            else:
                item = self.document.items[against]
                found.append(Verdict(statement, CONTRADICTED, (item.start, item.end)))
        return found

    def judge(self, s: Statement) -> Verdict:
        key = key_of(s)
        known = self.cache.get(key)
        if known is None:
            known = self.cache[key] = self._judge(s)
        return known._replace(statement=s)

    def _weigh(self, verdict: Verdict, document: Document) -> Verdict:
        """The verdict, where mentions both support and contradict, by the words around them."""
        s = verdict.statement
        rivals = self.rivals.get(key_of(s))
        if rivals is None:
            return verdict
        own = surroundings(document, s)
        same, against = (
            max(
                (self._nearness(own, o) + _SAME_PART * (o.of == s.of != ""), -k)
                for k, o in enumerate(side)
            )
            for side in rivals
        )
        if against[0] > same[0] + _MARGINS.get(s.kind, _MARGIN):
            return Verdict(s, CONTRADICTED, _place(rivals[1][-against[1]]))
        return verdict._replace(place=_place(rivals[0][-same[1]]))

    def _rival(self, s: Statement, same: list[Statement], against: list[Statement]) -> None:
        """Keeps what supports a statement and what contradicts it, for `_weigh`."""
        if against and max(len(same), len(against)) <= _MOST_RIVALS:
            self.rivals[key_of(s)] = same, against

    def _nearness(self, own: dict[str, float], o: Statement) -> float:
        """How much of what stands around a statement stands around a mention; rare words most."""
        if o.word not in self.surroundings:
            self.surroundings[o.word] = surroundings(self.document, o)
        around = self.surroundings[o.word]
        return sum(
            min(own[name], around[name]) / max(1, self.num_places.get(name, 1))
            for name in own.keys() & around.keys()
        )

    def _judge(self, s: Statement) -> Verdict:
        if s.kind in _CONDITIONS:
            return self._condition(s)
        if s.kind in ("drug", "allergy"):
            return self._drug(s) if s.drug else self._allergen(s)
        if s.kind in ("dose", "frequency"):
            return self._of_drug(s)
        if s.kind == "side":
            return self._side(s)
        if s.kind == "date":
            return self._date(s)
        if s.kind == "habit":
            habits = [o for o in self._all("habit") if o.value == s.value]
            habits += self.conditions.get(_ABUSES.get(s.value, ""), [])
            return self._polarity(s._replace(subject=""), habits)._replace(statement=s)
        if s.kind == "action":
            return self._action(s)
        return self._amount(s)

    def _all(self, *kinds: str) -> list[Statement]:
        return [o for kind in kinds for o in self.by_kind.get(kind, ())]

    def _condition(self, s: Statement) -> Verdict:
        mentions = self.conditions.get(s.value, [])
        if mentions:
            return self._polarity(s, mentions)
        general = KIND_OF.get(s.value)
        if (
            general
            and general in self.conditions
            and (general not in _GENERAL or s.value == "malignancy")
        ):
            return self._polarity(s, self.conditions[general])._replace(is_broader=True)
        if s.polarity == DENIED and self._is_normal(s.value):
            return Verdict(s, SUPPORTED, None, is_broader=True)
        otherwise = self._misspelled(s) or self._scattered(s)
        return self._polarity(s, [otherwise]) if otherwise else Verdict(s, NOT_SAID, None)

    def _scattered(self, s: Statement) -> Statement | None:
        """What the statement names, with words between: "lumps in her breast"."""
        clause = self.document.context.clause
        for words in SCATTERED.get(s.value, ()):
            places = [self.places_of_word.get(word, [])[:_MOST_RIVALS] for word in words]
            if not all(places):
                continue
            for i in places[0]:
                if all(any(_beside(clause, i, k) for k in others) for others in places[1:]):
                    return self._at(s, i)
        return None

    def _at(self, s: Statement, i: int) -> Statement:
        """The statement as item i makes it."""
        context, item = self.document.context, self.document.items[i]
        s = s._replace(of="", start=item.start, end=item.end, word=i)
        return s._replace(polarity=context.polarity[i], subject=context.subject[i])

    def _misspelled(self, s: Statement) -> Statement | None:
        """What the statement names, where the document has it in a slip of the pen: "carpel"."""
        names = [word for word in s.value.split() if word not in _COMMON_NAMES]
        found = [self._nearly(word) for word in names]
        if not found or None in found or all(name in self.places_of_word for name in names):
            return None
        return self._at(s, found[0] or 0)

    def _nearly(self, name: str) -> int | None:
        """The first item that is the word, or nearly so and no other known word."""
        if name in self.places_of_word:
            return self.places_of_word[name][0]
        for word in self.document.unknown.get(name[:2], ()):
            if _is_slip(name, word):
                return self.places_of_word[word][0]
        return None

    def _is_normal(self, name: str) -> bool:
        """Whether an examination that would have found it was normal, or denies the like."""
        exams = EXAMS_OF.get(name, ())
        return bool(exams) and ("all" in self.normal or any(e in self.normal for e in exams))

    def _polarity(self, s: Statement, mentions: list[Statement]) -> Verdict:
        """Explicit mentions of the same part count before others, and before questions."""
        if not mentions:
            return Verdict(s, NOT_SAID, None)
        subject = s.subject or PATIENT
        mentions_of = [o for o in mentions if not o.subject or o.subject == subject]
        if not s.subject and not (s.polarity == DENIED and mentions_of):
            mentions_of = mentions
        if not mentions_of:
            return Verdict(s, CONTRADICTED, _place(mentions[0]))
        mentions = mentions_of
        is_broader = False
        if s.of:
            near = [o for o in mentions if o.of and same_region(s.of, o.of)]
            is_broader = not near
            if not any(o.polarity in _ALIKE.get(s.polarity, (s.polarity,)) for o in near):
                near += [o for o in mentions if not o.of]
            mentions = near or mentions
        same = [o for o in mentions if o.polarity in _ALIKE.get(s.polarity, (s.polarity,))]
        if s.polarity == DENIED and not same:
            same = [o for o in mentions if o.polarity == ENDED]
        if s.polarity == DENIED and not same:
            same = [o for o in mentions if o.polarity == NORMAL]
        opposite = _OPPOSITE.get(s.polarity, ())
        against = [o for o in mentions if o.polarity in opposite and o.kind != "weak"]
        if same:
            self._rival(s, same, against)
            return Verdict(s, SUPPORTED, _place(same[0]), is_broader)
        if against:
            return Verdict(s, CONTRADICTED, _place(against[0]))
        if all(o.polarity == NORMAL for o in mentions):
            return Verdict(s, NOT_SAID, _place(mentions[0]))
        return Verdict(s, SUPPORTED, _place(mentions[0]), is_broader)

    def _drug(self, s: Statement) -> Verdict:
        assert s.drug is not None
        mentions = [o for o in self._all("drug", "allergy") if o.drug and same_drug(s.drug, o.drug)]
        if s.kind == "allergy":
            mentions = [o for o in mentions if o.kind == "allergy"]
        if not mentions:
            slip = self._misspelled(s) if s.kind == "drug" else None
            return Verdict(s, SUPPORTED, _place(slip)) if slip else Verdict(s, NOT_SAID, None)
        broader = all(o.drug and o.drug.ingredients != s.drug.ingredients for o in mentions)
        return Verdict(s, SUPPORTED, _place(mentions[0]), broader)

    def _allergen(self, s: Statement) -> Verdict:
        """A thing that is no drug; also where the dialogue speaks of it without "allergic"."""
        mentions = [o for o in self._all("allergy", "allergen") if o.value == s.value]
        return self._polarity(s, mentions)

    def _places_of(self, name: str) -> list[int]:
        """The items where the drug of that name stands."""
        if name not in self.drug_places:
            parts = set(name.split(" and "))
            self.drug_places[name] = [
                o.word
                for o in self.document.drugs
                if o.value == name
                or parts & set(o.value.split(" and "))
                or name.split(" ")[0] == o.value.split(" ")[0]
            ]
        return self.drug_places[name]

    def _of_drug(self, s: Statement) -> Verdict:
        """A dose or how often, which must be said of the same drug."""
        places = self._places_of(s.of) if s.of else []
        same = [
            o
            for o in self._all(s.kind)
            if _equal(s, o) and (not s.of or not o.of or _same_name(s.of, o.of))
        ]
        if same:
            if s.kind == "frequency":
                self._rival(s, same, [o for o in self._all(s.kind) if not _equal(s, o)])
            return Verdict(s, SUPPORTED, _place(same[0]))
        if s.kind == "dose":
            bare = self._bare(s, places)
            if bare:
                return bare
        other = [o for o in self._all(s.kind) if s.of and o.of and _same_name(s.of, o.of)]
        return Verdict(s, CONTRADICTED, _place(other[0])) if other else Verdict(s, NOT_SAID, None)

    def _bare(self, s: Statement, places: list[int]) -> Verdict | None:
        """A dose by its number alone, "I take 500", close to its drug."""
        if s.amount is None or s.amount.low != s.amount.high:
            return None
        reach = 6 if s.amount.low < 10 else 30
        for i in self.numbers.get(s.amount.low, ()):
            item = self.document.items[i]
            if self._unit(i) or self.document.padded[i + 1].word in UNITS:
                continue
            if self._is_others(i, places):
                continue
            if _distance(self._in_reach(places, i, reach), i) <= reach:
                return Verdict(s, SUPPORTED, (item.start, item.end))
        return None

    def _is_others(self, i: int, places: list[int]) -> bool:
        """Whether another drug stands before item i, closer than any of the places."""
        drugs = self.document.drugs
        at = bisect.bisect(drugs, i, key=lambda o: o.word) - 1
        if at < 0 or drugs[at].word in places:
            return False
        return i - drugs[at].word < _distance(places, i)

    def _in_reach(self, places: list[int], i: int, reach: int) -> list[int]:
        """The places of a drug that a bare number may mean; in its sentence for a small one."""
        if reach > 6:
            return places
        sentence = self.document.context.sentence
        return [place for place in places if sentence[place] == sentence[i]]

    def _amount(self, s: Statement) -> Verdict:
        if s.amount is None:  # of more digits than a float keeps
            places = self.places_of_word.get(s.value)
            if not places:
                return Verdict(s, NOT_SAID, None)
            item = self.document.items[places[0]]
            return Verdict(s, SUPPORTED, (item.start, item.end))
        kinds = ("duration", "age") if s.kind in ("duration", "age") else (s.kind,)
        same = [o for o in self._all(*kinds) if _equal(s, o)]
        if same:
            if s.kind == "duration":
                self._rival(s, same, [o for o in self._all("duration") if not _equal(s, o)])
            return Verdict(s, SUPPORTED, _place(same[0]))
        if s.kind == "ratio":
            dated = self._dated(s.amount)
            if dated:
                return Verdict(s, SUPPORTED, _place(dated))
            if s.amount.high != 10:
                return Verdict(s, NOT_SAID, None)
        elif s.amount.low != s.amount.high:
            low = self.numbers.get(s.amount.low, [])
            if s.kind == "number" and low and s.amount.high in self.numbers:
                item = self.document.items[low[0]]
                return Verdict(s, SUPPORTED, (item.start, item.end))
            return Verdict(s, NOT_SAID, None)
        number = s.amount.low / 360 if s.kind == "age" else s.amount.low
        if s.kind != "duration":
            for i in self.numbers.get(number, ()):
                if self._may_mean(i, s):
                    item = self.document.items[i]
                    return Verdict(s, SUPPORTED, (item.start, item.end))
        other = self._all("age") if s.kind == "age" else []
        return Verdict(s, CONTRADICTED, _place(other[0])) if other else Verdict(s, NOT_SAID, None)

    def _may_mean(self, i: int, s: Statement) -> bool:
        """Whether a number of the document may be the statement's: it has no other unit."""
        unit = s.amount.unit if s.amount else ""
        if unit and self._unit(i) not in ("", unit) and s.kind != "age":
            return False
        if not s.of:
            return True
        words = self.document.words
        near = range(max(0, i - _MEASURE_REACH), min(len(words), i + _MEASURE_REACH))
        following = self.document.padded[i + 1]
        counts = following.gap == "" and words[i + 1 : i + 2] not in ([following.word], [])
        if s.amount and s.amount.low < 10 and counts:
            return False  # "eight people"
        return s.of not in self.measures or any(MEASURES.get(words[k]) == s.of for k in near)

    def _unit(self, i: int) -> str:
        """The unit that the number at item i is said with; "" for none."""
        at = bisect.bisect(self.amounts, i, key=lambda o: o.word)
        for o in self.amounts[max(0, at - 1) : at]:
            if o.word == i and o.amount:
                return o.amount.unit
        return ""

    def _date(self, s: Statement) -> Verdict:
        stated = set(s.value.split())
        for o in self._all("date"):
            if stated <= set(o.value.split()):
                return Verdict(s, SUPPORTED, _place(o))
        without_year = {part for part in stated if part[0] != "y"}
        for o in self._all("date"):
            if without_year and set(o.value.split()) == without_year:
                return Verdict(s, SUPPORTED, _place(o), is_broader=True)
        return Verdict(s, NOT_SAID, None)

    def _dated(self, amount: Amount) -> Statement | None:
        """The date that a ratio such as 6/19 or 9/03 may be."""
        month, other = f"{amount.low:.0f}", f"{amount.high:.0f}"
        forms = {f"m{month} d{other}", f"m{month} y20{other.zfill(2)}"}
        return next((o for o in self._all("date") if o.value in forms), None)

    def _side(self, s: Statement) -> Verdict:
        same_part = [o for o in self._all("side") if _may_be_of(s, o)]
        if s.of == "handedness" and not same_part and "dominant" in self.places_of_word:
            same_part = [o for o in self._all("side") if o.of == "hand"]
        agreeing = [
            o
            for o in same_part
            if o.value == s.value or (o.value == "both" and (not s.of or not o.of or s.of == o.of))
        ]
        sides = {o.value for o in same_part}
        if agreeing:
            against = [o for o in same_part if {o.value, s.value} == {"left", "right"}]
            self._rival(s, agreeing, against)
            return Verdict(s, SUPPORTED, _place(agreeing[0]))
        if s.value == "both":
            plural = [
                at
                for at, part, many in self.document.parts
                if many and (not s.of or same_region(s.of, part))
            ]
            if plural:
                item = self.document.items[plural[0]]
                return Verdict(s, SUPPORTED, (item.start, item.end))
            if {"left", "right"} <= sides:
                return Verdict(s, SUPPORTED, _place(same_part[0]))
        if same_part:
            return Verdict(s, CONTRADICTED, _place(same_part[0]))
        return Verdict(s, NOT_SAID, None)

    def _is_off(self, i: int) -> bool:
        """Whether the drug at item i is denied as one that is taken: "do not take ibuprofen"."""
        before = self.document.items[max(0, i - 5) : i]
        taken = any(item.word in _TAKE for item in before)
        return taken and self.document.context.polarity[i] == DENIED

    def _action(self, s: Statement) -> Verdict:
        places = self._places_of(s.of) or self.places_of_word.get(s.of, [])
        near = [
            o
            for o in self._all("action")
            if o.of == s.of or (not o.of and _distance(places, o.word) <= _ACTION_REACH)
        ]
        stops = [o for o in near if o.value == "stop"]
        goes_on = [o for o in near if o.value != "stop"]
        if s.value == "stop":
            if stops:
                return Verdict(s, SUPPORTED, _place(stops[0]))
            denied = [i for i in places if self._is_off(i)]
            if denied:
                item = self.document.items[denied[0]]
                return Verdict(s, SUPPORTED, (item.start, item.end))
            verdict = CONTRADICTED if goes_on else NOT_SAID
            return Verdict(s, verdict, _place(goes_on[0]) if goes_on else None)
        if stops and not goes_on:
            return Verdict(s, CONTRADICTED, _place(stops[0]))
        if not places:
            return Verdict(s, NOT_SAID, None)
        item = self.document.items[places[0]]
        return Verdict(s, SUPPORTED, (item.start, item.end))


@functools.lru_cache(maxsize=16)
def read(text: str) -> Index:
    """The statements of a text; those of the last texts are kept, as each is compared often."""
    return Index(Document(text))


def surroundings(document: Document, s: Statement) -> dict[str, float]:
    """{what stands around a statement: 1 in its clause, less beyond it}; of a note, its sentence.

    Words, and the names of conditions, drugs and parts of the body, whatever they are called.
    """
    reach = _SPOKEN_REACH if document.spoken else _WRITTEN_REACH
    sentence, clause = document.context.sentence, document.context.clause
    home = {clause[s.word], clause[bisect.bisect_left(document.ends, s.end)]}
    found: dict[str, float] = {}
    for k in range(max(0, s.word - reach), min(len(document.items), s.word + reach + 1)):
        item = document.items[k]
        outside = not document.spoken and sentence[k] != sentence[s.word]
        if outside or s.start <= item.start < s.end:
            continue
        weight = 1.0 if clause[k] in home else _BEYOND
        for name in (document.words[k], document.names.get(k, "")):
            if len(name) > 2 and name not in _TELLS_NOTHING:
                found[name] = max(weight, found.get(name, 0.0))
    return found


def _beside(clause: list[int], i: int, k: int) -> bool:
    return 0 < abs(k - i) < 6 and clause[k] == clause[i]


def _is_slip(name: str, word: str) -> bool:
    """Whether two words differ by a letter, or by up to two next to each other in a long one."""
    most = 2 if len(name) > 8 else 1
    if abs(len(name) - len(word)) > most or min(len(name), len(word)) < 6:
        return False
    start = len(os.path.commonprefix((name, word)))
    end = len(os.path.commonprefix((name[start:][::-1], word[start:][::-1])))
    return max(len(name), len(word)) - start - end <= most


def _may_be_of(s: Statement, o: Statement) -> bool:
    """Whether the other side may be that of the statement's part; "bilaterally" alone is none's."""
    if not s.of or not o.of:
        return o.value != "both" or s.value == "both"
    return same_region(s.of, o.of)


def _place(statement: Statement) -> tuple[int, int]:
    return statement.start, statement.end


def _same_name(name: str, other: str) -> bool:
    """Whether two drugs' names share an ingredient."""
    a, b = set(name.split(" and ")), set(other.split(" and "))
    return bool(a & b) or name.split(" ")[0] == other.split(" ")[0]


def _distance(places: list[int], i: int) -> int:
    """How many items the next of these ascending places is away."""
    if not places:
        return 10**9
    at = bisect.bisect(places, i)
    return min(abs(i - place) for place in places[max(0, at - 1) : at + 1])


def _equal(s: Statement, o: Statement) -> bool:
    """Whether two amounts are one; "4 weeks" are a month, and "a few days" two to four."""
    a, b = s.amount, o.amount
    if a is None or b is None:
        return False
    low, high, other_low, other_high = a.low, a.high, b.low, b.high
    if a.unit != b.unit:
        if a.unit not in TO_MG or b.unit not in TO_MG:
            return False
        low, high = low * TO_MG[a.unit], high * TO_MG[a.unit]
        other_low, other_high = other_low * TO_MG[b.unit], other_high * TO_MG[b.unit]
    if s.kind == "dose" or s.kind == "ratio":
        return _close(low, other_low, 1e-6) and _close(high, other_high, 1e-6)
    slack = 0.08 if s.kind == "duration" and low >= 27 else 1e-3
    if _close(low, other_low, slack) and _close(high, other_high, slack):
        return True
    if a.is_vague and low <= other_low <= other_high <= high:
        return True
    return other_low != other_high and other_low * 0.999 <= low <= high <= other_high * 1.001


def _close(a: float, b: float, slack: float) -> bool:
    return abs(a - b) <= slack * max(abs(a), abs(b))
