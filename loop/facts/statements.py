"""What a text states: doses, durations, drugs, sides, conditions, habits and what is done."""

import bisect
from typing import NamedTuple

from .body import PARTS
from .conditions import EXAMINED, LOCAL, NORMAL_WORDS, PAINS, Condition, condition_at
from .context import (
    AFFIRMED,
    ASKED,
    DENIED,
    ENDED,
    FORMER,
    NORMAL,
    Context,
    is_speech,
    read_context,
)
from .dates import DAY_WORDS, date_at
from .drugs import Drug, drug_at
from .numerals import Item, parse_items
from .phrases import Found, Phrases, singular
from .quantities import Amount, amount_at, describe

_END = Item("", None, 0, 0, "\n")
_PART_REACH = 6
_AGREEING = frozenset("yes yeah yep yup correct definitely absolutely both all true".split())
_STATED = (AFFIRMED, DENIED, FORMER, ENDED)
NAMED = ("drug", "allergy", "diagnosis", "symptom", "finding", "weak", "habit")
_HABIT_UNITS = {"beer": "alcohol", "drink": "alcohol", "cigarette": "tobacco"}
_ASKED_KINDS = ("diagnosis", "symptom", "finding", "weak", "habit")
_MOST_UNKNOWN = 300  # that begin with the same letters, so that the time stays linear
_PADDING = [_END] * 12  # so that matchers can look ahead
_AMOUNT_WORDS = frozenset(
    """every each q per od fortnightly once twice thrice daily nightly hourly weekly monthly at
    before in x a an the past last couple few several dozen half quarter next bid bd tid tds qid
    qds qd qam qpm qhs hs mane nocte qod qday""".split()
)
SIDES = {"left": "left", "right": "right", "l": "left", "r": "right"}
SIDES |= dict.fromkeys(("both", "bilateral", "bilaterally"), "both")
SIDES |= {"left-sided": "left", "right-sided": "right"}
ACTIONS = {
    "stop": "stop stopped stopping discontinue discontinued discontinuing hold holding quit cease",
    "continue": "continue continued continuing continues maintain keep keeping refill resume stay",
    "start": "start started starting initiate begin began prescribe prescribed add initiated",
    "increase": "increase increased increasing double raise",
    "decrease": "decrease decreased reduce reduced lower taper wean",
}
_ACTION_OF = {word: action for action, words in ACTIONS.items() for word in words.split()}
HABITS: Phrases[str] = Phrases()
for _habit, _names in {
    "tobacco": "tobacco,smoke,smoking,smoker,smoked,cigarette,cigar,nicotine,vape,vaping,"
    "chewing tobacco,nonsmoker,non smoker,pack year,cigarette smoking",
    "alcohol": "alcohol,drink alcohol,drinking,drinker,drinks,beer,wine,liquor,etoh,ethanol,drink,"
    "alcoholic beverage,whiskey,vodka,nondrinker,non drinker",
    "drugs": "illicit drug,recreational drug,street drug,drug use,marijuana,cocaine,heroin,weed,"
    "cannabis,methamphetamine,iv drug,illicit,intravenous drug,illicit substance,meth,drugs,"
    "recreational,illegal drug,harder substance,hard drug,illicit substance,substance use",
}.items():
    for _phrase in _names.split(","):
        HABITS.add(_phrase, _habit)
_NO_ALCOHOL = frozenset(
    """water milk juice coffee tea soda pop fluid fluids liquid liquids caffeine formula gatorade
    pedialyte bottle breastmilk smoothie broth""".split()
)
_DENYING = frozenset(("nonsmoker", "nondrinker", "non"))
# What numbers below 10 measure; in speech, most others are "one of them".
MEASURES = {
    name: names.split()[0]
    for names in (
        """a1c hba1c glycohemoglobin; inr; potassium k; creatinine cr; gleason; apgar; gcs; psa;
        stage; grade; hemoglobin hgb hb; calcium ca; albumin; tsh; score; dilated; ph"""
    ).split(";")
    for name in names.split()
}
_NO_OBJECT = frozenset(
    """taking with using this that these those their your until when after before immediately
    having completely about from currently present been prior very really just then""".split()
)
_BEFORE = frozenset("history prior previous previously".split())
_NO_MORE = frozenset("still anymore more longer gone".split())
_OVER = frozenset("resolved resolving resolve resolves subsided gone cleared".split())
_FORMERLY = frozenset("quit former formerly stopped ex used previously".split())
# Around "blood pressure" and the like, they say that it is not as it should be.
_TROUBLE = frozenset(
    """trouble problem problems difficulty difficulties hard change changes changed loss less lost
    decreased decrease reduced low lower high higher elevated up bad worse poor blurry any issues
    issue weak weaker weird abnormal uncontrolled medication medications medicine pill pills
    disease history increased increase losing lose gained gain unable trying feels felt positive
    affecting affects hurt hurts wakes waking keeps better
    more off like get getting got started really very so feel""".split()
)
_PLURALS = frozenset(("feet", "teeth", "extremities", "lips", "calves"))
# "right" before these is no side: "right at the shoulder".
_AFTER_EXACTLY = frozenset(
    "at in on over around above below under behind next by where when".split()
)
_NOT_A_SIDE = frozenset("now away there here through before after handed-over alone".split())


# What people are allergic to, besides drugs.
ALLERGENS: Phrases[str] = Phrases()
for _phrase in (
    "latex,iodine,contrast,contrast dye,shellfish,peanut,tree nut,nut,egg,milk,dairy,soy,wheat,"
    "gluten,pollen,grass,dust,dust mite,mold,cat,dog,pet dander,bee,bee sting,wasp,strawberry,"
    "adhesive,tape,nickel,ragweed,fish,shrimp,horse serum,bandage,perfume,cockroach"
).split(","):
    ALLERGENS.add(_phrase, _phrase)


class Statement(NamedTuple):
    """One thing that a text says, at text[start:end]."""

    kind: str  # dose, duration, age, frequency, ratio, number, date, drug, side, diagnosis,
    # symptom, finding, allergy, habit or action
    value: str  # as a report shows it
    of: str  # what it belongs to: the drug of a dose, the part of a side; "" for nothing
    polarity: str  # affirmed, denied, possible, or asked
    subject: str  # patient or family
    start: int
    end: int
    word: int  # the index of its first item
    amount: Amount | None = None
    drug: Drug | None = None


class Document:
    """A text that was read once: its items, their context, and its statements in order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.items = parse_items(text)
        self.padded = self.items + _PADDING
        self.words = [singular(item.word) or str(item.number) for item in self.items]
        self.stems = [_digits(item) for item in self.items] + [""] * 12
        self.spoken = is_speech(text, self.items)
        self.context: Context = read_context(text, self.items, self.spoken)
        self.ends = [item.end for item in self.items]
        self.drugs: list[Statement] = []
        self.parts: list[tuple[int, str, bool]] = []  # (item, part, whether plural)
        self.statements = self._attach(self._read())
        if self.spoken:
            self.statements = self._answered_in_part(self.statements)
        self.names = {i: f"{part} (part)" for i, part, _ in self.parts}
        self.names |= {s.word: s.value for s in self.statements if s.kind in NAMED}
        self.unknown = self._unknown()

    def tells(self, statement: Statement) -> bool:
        """Whether it states something; what a dialogue only asks or considers does not."""
        if statement.kind in ("weak", "allergen"):
            return False
        if statement.kind == "action" and not statement.of:
            return False
        return not self.spoken or statement.polarity in _STATED

    def _answered_in_part(self, found: list[Statement]) -> list[Statement]:
        """Denies what a question lists and its answer leaves out while it names another.

        "Any fever, chills or cough? - A little cough." denies fever. Behind a "yes" the rest stays
        open.
        """
        context = self.context
        named: dict[int, set[str]] = {}  # by turn
        for s in found:
            if not context.asks[s.word] and s.polarity in (AFFIRMED, FORMER, ENDED):
                named.setdefault(context.turn[s.word], set()).add(s.value)
        asked: dict[int, set[str]] = {}
        for s in found:
            if context.asks[s.word] and s.kind in _ASKED_KINDS:
                asked.setdefault(context.turn[s.word], set()).add(s.value)
        agreed = {
            context.turn[i]
            for i, item in enumerate(self.items)
            if item.word in _AGREEING and i - bisect.bisect_left(context.turn, context.turn[i]) < 6
        }
        done = []
        for s in found:
            turn = context.turn[s.word]
            answer = named.get(turn + 1, set()) & asked.get(turn, set())
            open_to = context.asks[s.word] and s.kind in _ASKED_KINDS and s.polarity != DENIED
            if open_to and answer and s.value not in answer:
                s = s._replace(polarity=ASKED if turn + 1 in agreed else DENIED)
                for k in range(s.word, bisect.bisect_left(self.ends, s.end) + 1):
                    context.polarity[k] = s.polarity
            done.append(s)
        return done

    def _unknown(self) -> dict[str, list[str]]:
        """{first two letters: the longer words that belong to no statement}"""
        named: set[int] = set()
        for s in self.statements:
            around = range(s.word, min(s.word + 4, len(self.items)))
            named.update(k for k in around if self.items[k].end <= s.end)
        found: dict[str, dict[str, None]] = {}
        for i, word in enumerate(self.words):
            if len(word) > 5 and i not in named:
                same = found.setdefault(word[:2], {})
                if len(same) < _MOST_UNKNOWN:
                    same[word] = None
        return {start: list(words) for start, words in found.items()}

    def _read(self) -> list[Statement]:
        found: list[Statement] = []
        i = 0
        while i < len(self.items):
            statement, used = self._at(i)
            if statement:
                found.append(statement)
                if statement.amount and statement.amount.unit in _HABIT_UNITS:
                    habit = self._make("habit", _HABIT_UNITS[statement.amount.unit], i, used)
                    found.append(habit)
                if statement.drug:
                    self.drugs.append(statement)
            i += used
        return found

    def _at(self, i: int) -> tuple[Statement | None, int]:
        """(the statement that begins at item i, how many items to go on)"""
        item, stems = self.padded[i], self.stems
        if item.number is not None or item.word in DAY_WORDS:
            date = date_at(self.text, self.padded, i)
            if date:
                return self._make("date", date.value, i, date.num_items), date.num_items
        if item.number is not None or item.word in _AMOUNT_WORDS or item.word[:1] == "q":
            amount = amount_at(self.text, self.padded, i)
            if amount and not self._is_manner(amount, i):
                return self._amount(amount, i), amount.num_items
        if item.word[:1].isdecimal() and item.word.replace(".", "").isdecimal():
            return self._make("number", item.word, i, 1), 1  # more digits than a float keeps
        drug = drug_at(self.padded, stems, i)
        if drug:
            made = self._make("drug", drug.meaning.name, i, drug.num_items)
            return made._replace(drug=drug.meaning), drug.num_items
        habit = HABITS.at(self.padded, stems, i)
        if habit:
            return self._habit(habit, i), habit.num_items
        allergen = ALLERGENS.at(self.padded, stems, i)
        if allergen:
            return self._make(
                "allergen", allergen.meaning, i, allergen.num_items
            ), allergen.num_items
        part = PARTS.at(self.padded, stems, i)
        condition = condition_at(self.padded, stems, i)
        if part:
            self._add_part(part, i)
        if condition and not (part and part.num_items > condition.num_items):
            for k in range(i + 1, i + condition.num_items):  # "swelling in your legs"
                inner = PARTS.at(self.padded, stems, k)
                if inner:
                    self._add_part(inner, k)
            return self._condition(condition, i), condition.num_items
        if item.word in SIDES:
            return self._side(i), 1
        if item.word in _ACTION_OF:
            return self._make("action", _ACTION_OF[item.word], i, 1), 1
        return None, part.num_items if part else 1

    def _add_part(self, found: Found[str], i: int) -> None:
        word = self.items[i].word
        plural = word != self.stems[i] or word in _PLURALS or self.padded[i - 1].word == "each"
        self.parts.append((i, found.meaning, plural))

    def _make(self, kind: str, value: str, i: int, count: int) -> Statement:
        last = min(i + count, len(self.items)) - 1
        context = self.context
        return Statement(
            kind, value, "", context.polarity[last], context.subject[last],
            self.items[i].start, self.items[last].end, i,
        )  # fmt: skip

    def _condition(self, found: Found[Condition], i: int) -> Statement | None:
        meaning, count = found
        if not meaning.kind or (
            meaning.name == "any allergy" and self.padded[i + count].gap == ":"
        ):
            return None  # it is none, or a heading
        kind = "weak" if meaning.is_weak else meaning.kind
        made = self._make(kind, meaning.name, i, count)
        if kind == "weak" and made.polarity == AFFIRMED and not self._near(i, _TROUBLE, 7):
            made = made._replace(polarity=NORMAL)
        if made.polarity == AFFIRMED and self._near(i, _OVER, 8):
            made = made._replace(polarity=ENDED)
        if made.polarity == AFFIRMED and not self.spoken and self._near(i, _BEFORE, 6):
            made = made._replace(polarity=FORMER)
        if made.polarity == DENIED and self.spoken and self._near(i, _NO_MORE, 8):
            made = made._replace(polarity=ENDED)
        if meaning.name in PAINS:
            return made._replace(value="pain", of=PAINS[meaning.name])
        return made

    def _habit(self, found: Found[str], i: int) -> Statement | None:
        word, following = self.padded[i].word, self.padded[i + found.num_items].word
        if following.startswith("allerg"):
            return None
        made = self._make("habit", found.meaning, i, found.num_items)
        if word in _DENYING:
            return made._replace(polarity=DENIED)
        if word.startswith("drink") and self._near(i, _NO_ALCOHOL, 6):
            return None
        former = made.polarity == AFFIRMED and self._near(i, _FORMERLY, 4)
        return made._replace(polarity=FORMER) if former else made

    def _near(self, i: int, words: frozenset[str], reach: int) -> bool:
        """Whether one of the words stands in the clause of item i, so many items away at most."""
        clause = self.context.clause
        around = range(max(0, i - reach), min(len(self.items), i + reach + 1))
        return any(clause[k] == clause[i] and self.items[k].word in words for k in around)

    def normal_exams(self) -> set[str]:
        """What the text says is normal: keys of EXAMS, or "all"."""
        return {
            EXAMINED[item.word]
            for i, item in enumerate(self.items)
            if item.word in EXAMINED and self._near(i, NORMAL_WORDS, 9)
        }

    def _amount(self, amount: Amount, i: int) -> Statement | None:
        if not self.spoken and self.items[i].word in ("last", "next", "past"):
            if amount.low == amount.high:
                return None  # "over the last week"; in speech, "next week" may be "in 1 week"
        made = self._make(amount.kind, describe(amount), i, amount.num_items)
        bare = amount.kind == "number" and not amount.unit
        if bare and amount.low < 10 and amount.low == int(amount.low):
            measure = self._measure(i)
            if not measure:
                return None
            made = made._replace(of=measure)
        return made._replace(amount=amount)

    def _is_manner(self, amount: Amount, i: int) -> bool:
        """Whether it is "daily activities", or "at night" without a drug."""
        following = self.padded[i + amount.num_items].word
        if amount.kind != "frequency":
            return False
        if following in ("activities", "activity", "living", "life", "routine", "basis", "work"):
            return True
        vague = self.items[i].word in ("at", "in", "before")
        return vague and not self.spoken and not self._nearest_drug(i, "dose")

    def _measure(self, i: int) -> str:
        """What the number at item i measures, such as "a1c"; "" for nothing that is known."""
        for k in range(i - 1, max(-1, i - 4), -1):
            if self.context.clause[k] != self.context.clause[i]:
                break
            if self.words[k] in MEASURES:
                return MEASURES[self.words[k]]
        return ""

    def _side(self, i: int) -> Statement | None:
        """A side with its part; None for "all right", "right now" and "I left"."""
        word, items = self.items[i].word, self.padded
        before, after = items[i - 1].word if i else "", items[i + 1]
        if self.spoken and (
            self._is_choice(i) or (word == "right" and after.word in _AFTER_EXACTLY)
        ):
            return None
        if len(word) == 1 and (self.spoken or before in ("", "'")):
            return None
        part, count = "", 1
        if after.word == "handed" or (after.word, items[i + 2].word) == ("hand", "dominant"):
            return self._make("side", SIDES[word], i, 2)._replace(of="handedness")
        for k in range(i + 1, min(i + 5, len(self.items))):
            if items[k].gap not in ("", ",", "(", ")"):
                break
            found = PARTS.at(self.padded, self.stems, k)
            if found:
                part, count = found.meaning, k + found.num_items - i
                break
        if (
            not part
            and not self._answers_which(i)
            and (
                before in ("all", "that's", "i", "is", "she", "he", "was", "have", "has")
                or after.word in _NOT_A_SIDE
            )
        ):
            return None
        bilateral = word.startswith("bi")
        if not part and not bilateral:
            on_the = before in ("the", "my", "your", "his", "her") or self._answers_which(i)
            if not on_the and after.word not in ("side", "sided"):
                return None
        made = self._make("side", SIDES[word], i, count)
        return made._replace(of=part)

    def _is_choice(self, i: int) -> bool:
        """Whether the side at item i is one of "left or right", as a question asks."""
        around = [item.word for item in self.items[max(0, i - 4) : i + 5]]
        at = i - max(0, i - 4)
        return any(
            around[k] == "or" and around[k + 1 :] and SIDES.keys() & set(around[other])
            for k in range(len(around))
            for other in (slice(0, at) if k < at else slice(at + 1, None),)
        )

    def _answers_which(self, i: int) -> bool:
        """Whether the side at item i answers "which knee?" or "left or right?"."""
        item, context = self.items[i], self.context
        if not self.spoken or item.gap not in ("\n", "?"):
            return False
        asked = [
            other.word
            for k, other in enumerate(self.items[max(0, i - 14) : i], max(0, i - 14))
            if context.sentence[k] >= context.sentence[i] - 2
        ]
        return "which" in asked or ("or" in asked and bool(SIDES.keys() & set(asked)))

    def _attach(self, found: list[Statement]) -> list[Statement]:
        """The statements with what they belong to."""
        sentence = self.context.sentence
        done, last_part = [], 0
        for statement in found:
            i = statement.word
            if statement.kind in ("dose", "frequency", "action"):
                of = self._nearest_drug(i, statement.kind)
                if not of and statement.value == "stop" and self.items[i].word != "quit":
                    of = self._next_word(i)
                    if HABITS.at(self.padded, self.stems, i + 1):
                        continue  # "quit smoking" is a habit
                statement = statement._replace(of=of)
            elif statement.kind == "side" and not statement.of:
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

    def _nearest_drug(self, i: int, kind: str) -> str:
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
            if kind == "dose" and 0 < drug.word - i < 6 and self.padded[drug.word - 1].word == "of":
                cost = 0  # "ten units of lantus"
            if cost < least and cost < (16 if self.spoken else 14):
                best, least = drug.value, cost
        return best

    def _next_word(self, i: int) -> str:
        """What is stopped at item i, where it is no known drug; "" where nothing follows."""
        for k in range(i + 1, min(i + 5, len(self.items))):
            if self.context.clause[k] != self.context.clause[i] or self.items[k].gap in (",", ":"):
                break
            if len(self.items[k].word) > 3 and self.items[k].word not in _NO_OBJECT:
                return self.words[k]
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

    def _allergy(self, statement: Statement) -> Statement:
        """A drug behind "allergic to" or "allergies:" is an allergy."""
        if statement.kind not in ("drug", "allergen"):
            return statement
        if self._is_forbidden(statement.word):  # "I cannot have codeine"
            return statement._replace(kind="allergy", polarity=AFFIRMED)
        start = max(0, statement.word - 12)
        sentence = self.context.sentence
        for k in range(statement.word - 1, start - 1, -1):
            if sentence[k] != sentence[statement.word] and not self.spoken:
                break
            if self.items[k].word.startswith("allerg"):
                return statement._replace(kind="allergy")
        return statement


def _digits(item: Item) -> str:
    return f"{item.number:g}" if item.number is not None else singular(item.word)
