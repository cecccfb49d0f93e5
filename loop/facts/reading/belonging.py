"""What a statement belongs to: a dose to its drug, a side to its part of the body."""

import bisect

from ..conditions import LOCAL
from .parsed import Parsed, Statement
from .polarity import AFFIRMED
from .vocabulary import HABITS, PHRASAL_VERBS

_PART_REACH = 6
_CAUSES = frozenset("gives gave causes caused makes".split())
_REACTIONS = frozenset("hives itch itchy itching swell anaphylaxis wheeze".split())
_FOR_ALLERGY = frozenset(
    """relief medicine medication medications pill pills shot shots spray season test tests testing
    symptoms""".split()
)
_NO_OBJECT = frozenset(
    """taking with use using this that these those their your until when after before immediately
    having completely about from currently present been prior very really just then""".split()
)


# They stop nothing but a drug: who "takes off" shoes, or whose foot "drops", stops no treatment.
_STOPS_DRUGS = PHRASAL_VERBS | {"quit", "drop", "ditch"}


class Belonging:
    """Finds what the statements of a text belong to."""

    def __init__(
        self, parsed: Parsed, drugs: list[Statement], parts: list[tuple[int, str, bool]]
    ) -> None:
        """drugs, parts: as the reading of the text goes on to fill them, in its order."""
        self.parsed, self.drugs, self.parts = parsed, drugs, parts
        self.items, self.context, self.spoken = parsed.items, parsed.context, parsed.spoken

    def attach(self, found: list[Statement]) -> list[Statement]:
        """The statements with what they belong to."""
        sentence = self.context.sentence
        done, last_part = [], 0
        for statement in found:
            i = statement.word
            if statement.kind in ("dose", "frequency", "action"):
                of = self.nearest_drug(i, statement.kind)
                if not of and statement.value == "stop" and self.items[i].word not in _STOPS_DRUGS:
                    of = self._next_word(i)
                    if HABITS.at(self.parsed.padded, self.parsed.stems, i + 1):
                        continue  # "quit smoking" is a habit
                statement = statement._replace(of=of)
            elif statement.kind == "side" and not statement.of and "than" not in statement.value:
                while last_part + 1 < len(self.parts) and self.parts[last_part + 1][0] < i:
                    last_part += 1
                if self.parts and self.parts[last_part][0] < i:
                    at, part, _ = self.parts[last_part]
                    near = i - at < (60 if self.spoken else 12)
                    if near and (self.spoken or sentence[at] == sentence[i]):
                        statement = statement._replace(of=part)
            elif statement.value in LOCAL and not statement.of:
                statement = statement._replace(of=self._nearest_part(i))
            done.append(self._allergy(statement))
        return done

    def _nearest_part(self, i: int) -> str:
        """The part of the body in the clause of item i, close to it; "" where none is."""
        clause = self.context.clause
        at = bisect.bisect(self.parts, i, key=lambda part: part[0])
        near = [
            (self._part_cost(i, k), part)
            for k, part, _ in self.parts[max(0, at - 1) : at + 2]
            if clause[k] == clause[i] and abs(k - i) <= _PART_REACH
        ]
        return min(near)[1] if near else ""

    def _part_cost(self, i: int, k: int) -> int:
        """How far the part at item k is from a condition at item i."""
        between = self.items[min(i, k) + 1 : max(i, k) + 1]
        parted = any(  # "no ankle edema or calf pain"
            item.gap == "," or item.word in ("or", "and") for item in between
        )
        return abs(k - i) + 3 * parted + (2 if k < i - 1 else 0)

    def nearest_drug(self, i: int, kind: str) -> str:
        """The name of the drug of the dose, frequency or action at item i."""
        sentence = self.context.sentence
        best, least = "", 1000
        for drug in self._drugs_around(i):
            if not self.spoken and sentence[drug.word] != sentence[i]:
                continue
            behind = drug.word > i
            cost = abs(drug.word - i) + (4 if behind and kind != "action" else 0)
            if kind == "action" and not behind:
                cost += 8
            if kind == "dose" and 0 < drug.word - i < 6 and self.items[drug.word - 1].word == "of":
                cost = 0  # "ten units of lantus"
            if cost < least and cost < (16 if self.spoken else 14):
                best, least = drug.value, cost
        return best

    def _next_word(self, i: int) -> str:
        """What is stopped at item i, where it is no known drug; "" where nothing follows."""
        for k in range(i + 1, min(i + 5, len(self.items))):
            if self.context.clause[k] != self.context.clause[i] or self.items[k].gap in (",", ":"):
                break
            if self.items[k].word in ("and", "if", "but", "or"):
                break
            if len(self.items[k].word) > 3 and self.items[k].word not in _NO_OBJECT:
                return self.parsed.words[k]
        return ""

    def _drugs_around(self, i: int) -> list[Statement]:
        at = bisect.bisect(self.drugs, i, key=lambda drug: drug.word)
        return self.drugs[max(0, at - 2) : at + 2]

    def _is_forbidden(self, i: int) -> bool:
        before = [item.word for item in self.items[max(0, i - 5) : i]]
        verbs = [k for k, word in enumerate(before) if word in ("have", "take", "tolerate")]
        return bool(verbs) and any(
            word in ("cannot", "can't")
            or (word in ("n't", "not") and before[k - 1] in ("ca", "can"))
            for k, word in enumerate(before[: verbs[-1]])
        )

    def _causes_reaction(self, i: int) -> bool:
        """Whether the thing at item i does what an allergen does.

        "Penicillin gives me hives", "itching with penicillin".
        """
        behind = [item.word for item in self.items[i + 1 : i + 8]]
        if any(word in _CAUSES for word in behind[:3]) and _REACTIONS & set(behind[1:]):
            return True
        before = [item.word for item in self.items[max(0, i - 4) : i]]
        return bool({"with", "from"} & set(before[-2:]) and _REACTIONS & set(before))

    def _names_allergy(self, statement: Statement) -> bool:
        """Whether "allergy" follows at once, as in "latex allergy"; no "allergy shots"."""
        k = bisect.bisect_left(self.parsed.ends, statement.end) + 1
        following, behind = self.parsed.padded[k], self.parsed.padded[k + 1]
        if following.word not in ("allergy", "allergies", "allergic") or following.gap:
            return False
        return behind.word not in _FOR_ALLERGY or behind.gap != ""

    def _allergy(self, statement: Statement) -> Statement:
        """A drug behind "allergic to" or "allergies:" is an allergy."""
        if statement.kind not in ("drug", "allergen"):
            return statement
        forbidden = self._is_forbidden(statement.word)  # "I cannot have codeine"
        if forbidden or self._causes_reaction(statement.word):
            self.context.polarity[statement.word] = AFFIRMED  # of an allergy to it
            return statement._replace(kind="allergy", polarity=AFFIRMED)
        if self._names_allergy(statement):
            return statement._replace(kind="allergy")
        start = max(0, statement.word - 12)
        sentence = self.context.sentence
        for k in range(statement.word - 1, start - 1, -1):
            if sentence[k] != sentence[statement.word] and not self.spoken:
                break
            if self.items[k].word.startswith("allerg"):
                return statement._replace(kind="allergy")
        return statement
