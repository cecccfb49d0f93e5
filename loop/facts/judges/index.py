"""The statements of a text by what they can support."""

import bisect
from collections import Counter

from ..claims import Usage
from ..conditions import EXAMS_OF, KIND_OF
from ..measures.dates import ORDINALS
from ..reading.parsed import Statement
from ..reading.polarity import DENIED
from ..reading.subjects import FAMILY
from ..reading.vocabulary import MEASURES
from ..statements import Document
from .verdicts import Key, Verdict, key_of

CONDITION_KINDS = ("diagnosis", "symptom", "finding")
_LEAST_ORDINAL = 10  # lower ones count: "my first period"
_RATIO_ITEMS = 3  # of "120 over 80"
MOST_RIVALS = 40  # mentions of one thing that are weighed, so that the time stays linear


class Index:
    """The statements of a document by what they can support."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.by_kind: dict[str, list[Statement]] = {}
        self.conditions: dict[str, list[Statement]] = {}
        for statement in document.statements:
            self.by_kind.setdefault(statement.kind, []).append(statement)
            if statement.kind in (*CONDITION_KINDS, "weak"):
                name = statement.value
                while name:
                    self.conditions.setdefault(name, []).append(statement)
                    name = KIND_OF.get(name, "")
        self.drug_places: dict[str, list[int]] = {}
        self.numbers: dict[float, list[int]] = {}
        for i, item in enumerate(document.items):
            if item.number is not None:
                self.numbers.setdefault(item.number, []).append(i)
            elif ORDINALS.get(item.word, 0) >= _LEAST_ORDINAL:  # "the nineteenth"
                self.numbers.setdefault(float(ORDINALS[item.word]), []).append(i)
        self.places_of_word: dict[str, list[int]] = {}
        for i, word in enumerate(document.words):
            self.places_of_word.setdefault(word, []).append(i)
        self.amounts = [o for o in document.statements if o.amount]
        self.in_ratios = {
            o.word + k for o in self.amounts if o.kind == "ratio" for k in range(_RATIO_ITEMS)
        }
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

    def all(self, *kinds: str) -> list[Statement]:
        """The statements of these kinds, kind by kind."""
        return [o for kind in kinds for o in self.by_kind.get(kind, ())]

    def places_of_drug(self, name: str) -> list[int]:
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

    def unit_at(self, i: int) -> str:
        """The unit that the number at item i is said with; "" for none."""
        amount = self._amount_at(i)
        return amount.amount.unit if amount and amount.amount else ""

    def label_at(self, i: int) -> str:
        """What the number at item i measures; "" for nothing that is known."""
        amount = self._amount_at(i)
        return amount.of if amount and amount.kind == "number" else ""

    def _amount_at(self, i: int) -> Statement | None:
        at = bisect.bisect(self.amounts, i, key=lambda o: o.word)
        return next((o for o in self.amounts[max(0, at - 1) : at] if o.word == i), None)

    def keep_rivals(self, s: Statement, same: list[Statement], against: list[Statement]) -> None:
        """Keeps what supports a statement and what contradicts it, for `weigh` of nearness.py."""
        if against and max(len(same), len(against)) <= MOST_RIVALS:
            self.rivals[key_of(s)] = same, against


def same_name(name: str, other: str) -> bool:
    """Whether two drugs' names share an ingredient."""
    a, b = set(name.split(" and ")), set(other.split(" and "))
    return bool(a & b) or name.split(" ")[0] == other.split(" ")[0]


def distance(places: list[int], i: int) -> int:
    """How many items the next of these ascending places is away."""
    if not places:
        return 10**9
    at = bisect.bisect(places, i)
    return min(abs(i - place) for place in places[max(0, at - 1) : at + 1])
