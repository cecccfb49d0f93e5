"""What a text says of a statement of another: supported, contradicted, or not said."""

from typing import NamedTuple

from ..reading.parsed import Statement
from ..reading.polarity import DENIED, ENDED, FORMER, POSSIBLE, QUIET
from ..reading.subjects import FAMILY

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
_SHOWN = {DENIED: "no ", POSSIBLE: "perhaps ", FORMER: "formerly ", ENDED: "formerly "}
_SHOWN |= {QUIET: "no more "}

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


def distinct(found: list[Verdict]) -> list[Verdict]:
    """The first of each thing that a text states, and the first of those that are wrong."""
    first: dict[tuple, Verdict] = {}
    for verdict in found:
        s = verdict.statement
        first.setdefault((*key_of(s), verdict.verdict), verdict)
    return list(first.values())


def place_of(statement: Statement) -> tuple[int, int]:
    """Where a statement stands: text[place[0]:place[1]]."""
    return statement.start, statement.end
