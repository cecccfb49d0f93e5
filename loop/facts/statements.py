"""What a text states: doses, durations, drugs, sides, conditions, habits and what is done."""

import bisect

from .body import PARTS
from .conditions import EXAMINED, NORMAL_WORDS, PAINS, Condition, condition_at
from .drugs import drug_at
from .measures.dates import DAY_WORDS, date_at
from .measures.frequencies import FREQUENCY_WORDS
from .measures.quantities import amount_at
from .measures.units import DAYS, UNITS, Amount, describe
from .phrases import Found
from .reading.belonging import Belonging
from .reading.clauses import NO_WORDS
from .reading.parsed import Parsed, Statement
from .reading.polarity import AFFIRMED, ASKED, CURRENT, DENIED, DENIES, ENDED, FORMER, NORMAL, QUIET
from .reading.sides import compared_at, latin_side_at, side_at
from .reading.vocabulary import (
    ACTION_OF,
    ALLERGENS,
    HABITS,
    LABELLED_UNITS,
    LABELS,
    MEASURES,
    PHRASAL_ACTIONS,
    PHRASAL_VERBS,
    REPLACES,
    SIDES,
    SWITCHES,
)

_AGREEING = frozenset("yes yeah yep yup correct definitely absolutely both all true".split())
_STATED = (AFFIRMED, CURRENT, DENIED, FORMER, ENDED)
NAMED = ("drug", "allergy", "diagnosis", "symptom", "finding", "weak", "habit")
_HABIT_UNITS = {"beer": "alcohol", "drink": "alcohol", "cigarette": "tobacco"}
_ASKED_KINDS = ("diagnosis", "symptom", "finding", "weak", "habit")
_MOST_UNKNOWN = 300  # that begin with the same letters, so that the time stays linear
_AMOUNT_WORDS = frozenset(
    """every each q per on od fortnightly once twice thrice daily nightly hourly weekly monthly at
    before in x a an the past last couple few several dozen half quarter next bid bd tid tds qid
    qds qd qam qpm qhs hs mane nocte qod qday third alternate""".split()
)
_AMOUNT_WORDS |= FREQUENCY_WORDS
_NO_ALCOHOL = frozenset(
    """water milk juice coffee tea soda pop fluid fluids liquid liquids caffeine formula gatorade
    pedialyte bottle breastmilk smoothie broth""".split()
)
_DENYING = frozenset(("nonsmoker", "nondrinker", "non"))
_BEFORE = frozenset("history prior previous previously".split())
_NO_MORE = frozenset("still anymore more longer gone".split())
_NO_ALLERGIES = ("nkda", "nka")
_OVER = frozenset("resolved resolving resolve resolves subsided gone cleared".split())
# Behind a condition, they make it one that is looked for or prevented.
_TESTED = frozenset(
    """test tests testing tested screen screens screening vaccine vaccines vaccination
    vaccinations immunization shot shots prevention prophylaxis panel risk""".split()
)
_PRESSING = frozenset("that this press push pressing pushing touch move bend squeeze".split())
_TRIED = frozenset("palpation palpable movement motion testing strength resisted".split())
_SPEEDS = ("mile", "miles", "kilometers", "ml", "cc", "beats", "breaths")
_OTHER = frozenset("other further additional new".split())
_NEVER_NORMAL = ("trauma", "fall")  # whoever fell, or was hit, was hurt
_ENDS_OF_SCALE = ("no", "worst", "imaginable")
_SCALE = frozenset("being scale imaginable possible".split())
_RECENT = frozenset("recent recently issue issues problem problems trouble complications".split())
_CURRENTLY = frozenset("current currently active actively ongoing continues still".split())
_HAVE = frozenset("have get be suffer experience".split())
_OCCASION = frozenset("during my your her this that".split())
_ONGOING = frozenset("ongoing persistent continued continuing current".split())
_DID_ONCE = ("smoked", "drank", "vaped")
_FORMERLY = frozenset("quit quitting former formerly stopped ex used previously".split())
# Around "blood pressure" and the like, they say that it is not as it should be.
_TROUBLE = frozenset(
    """trouble problem problems difficulty difficulties hard change changes changed loss less lost
    decreased decrease reduced low lower high higher elevated up bad worse poor blurry any issues
    issue weak weaker weird abnormal uncontrolled medication medications medicine pill pills
    disease history increased increase losing lose gained gain unable trying feels felt positive
    affecting affects hurt hurts enlarged swollen large big wakes waking keeps better
    more off like get getting got started really very so feel""".split()
)
_LONG = frozenset("years months decades ages".split())
_BESIDES, _BESIDES_REACH = frozenset("aside besides apart than except".split()), 8
_ABOUT = frozenset("about how's how is for with".split())
_OWN = frozenset("your his her".split())
_PHRASAL_REACH, _SWITCH_REACH = 6, 16
_PLURALS = frozenset(("feet", "teeth", "extremities", "lips", "calves"))


class Document(Parsed):
    """A text that was read once: its items, their context, and its statements in order."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.drugs: list[Statement] = []
        self.parts: list[tuple[int, str, bool]] = []  # (item, part, whether plural)
        self._belonging = Belonging(self, self.drugs, self.parts)
        self.statements = self._belonging.attach(self._read())
        if self.spoken:
            self.statements = self._answered_in_part(self._of_one_side(self.statements))
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

    def _of_one_side(self, found: list[Statement]) -> list[Statement]:
        """Without the "both" of a question that is answered by one side: "just the left"."""
        turn = self.context.turn
        sides = [s for s in found if s.kind == "side"]
        named = {turn[s.word] for s in sides if s.value in ("left", "right")}
        named -= {turn[s.word] for s in sides if s.value == "both"}
        return [
            s
            for s in found
            if s.kind != "side"
            or s.value != "both"
            or not self.context.asks[s.word]
            or turn[s.word] + 1 not in named
        ]

    def _answered_in_part(self, found: list[Statement]) -> list[Statement]:
        """Denies what a question lists and its answer leaves out while it names another.

        "Any fever, chills or cough? - A little cough." denies fever. Behind a "yes" the rest stays
        open.
        """
        context = self.context
        named: dict[int, set[str]] = {}  # by turn
        denied = {(context.turn[s.word], s.value) for s in found if s.polarity == DENIED}
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
            elif (
                open_to and s.kind != "habit" and (turn + 1, s.value) in denied
            ):  # "yeah. No vision changes"
                s = s._replace(polarity=DENIED)
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
            if self.items[i].word in SIDES:
                compared = compared_at(self, i)
                if compared:
                    found.append(self._make("side", compared, i, 1))
            if self.items[i].word in SWITCHES | REPLACES:
                found += self._switched(i)
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
        latin = latin_side_at(self, i)
        if latin:
            return self._make("side", latin.side, i, 1)._replace(of=latin.part), 1
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
        action = self._phrasal_action(i) if item.word in PHRASAL_VERBS else ""
        if action:
            return self._make("action", action, i, 1), 1
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
            side = side_at(self, i)
            if side is None:
                return None, 1
            made = self._make("side", side.side, i, side.num_items)
            return made._replace(of=side.part), 1
        if item.word in ACTION_OF:
            return self._make("action", ACTION_OF[item.word], i, 1), 1
        return None, part.num_items if part else 1

    def _switched(self, i: int) -> list[Statement]:
        """What stops and starts behind the verb at item i; none where no drug is switched."""
        ends = min(i + _SWITCH_REACH, len(self.items))
        words = [self.items[k].word for k in range(i, ends)]
        drugs = [k for k in range(i, ends) if drug_at(self.padded, self.stems, k)]
        if len(drugs) < 2 or self.context.sentence[drugs[1]] != self.context.sentence[i]:
            return []
        from_to = words[0] in SWITCHES and "from" in words[: drugs[0] - i]
        between = words[drugs[0] - i : drugs[1] - i]
        if not (from_to and "to" in between) and not (words[0] in REPLACES and "with" in between):
            return []
        actions = zip(("stop", "start"), drugs)
        return [self._make("action", action, k - 1, 1) for action, k in actions]

    def _phrasal_action(self, i: int) -> str:
        """What the verb at item i does together with a word close behind it: "go up on"."""
        for k in range(i + 1, min(i + _PHRASAL_REACH, len(self.items))):
            if self.context.sentence[k] != self.context.sentence[i]:
                break
            action = PHRASAL_ACTIONS.get((self.items[i].word, self.items[k].word))
            between = [item.word for item in self.items[i + 1 : k]]
            if action == "stop" and between not in ([], ["you"], ["him"], ["her"], ["me"]):
                break  # "get some time off"
            if action:
                return action
        return ""

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
        if not meaning.kind or (meaning.name == "any allergy" and self._is_heading(i, count)):
            return None
        before = [item.word for item in self.items[max(0, i - 2) : i]]
        if (before[-1:] and before[-1] in _ENDS_OF_SCALE) or "worst" in before:
            if self.near(i, _SCALE, 6):
                return None  # "zero being no pain", "the worst possible pain"
        kind = "weak" if meaning.is_weak or self._is_tested(i, count) else meaning.kind
        made = self._make(kind, meaning.name, i, count)
        if i and self.items[i - 1].word == "no" and self.items[i].gap == "" and not self.spoken:
            if self.items[i - 2].word not in DENIES or i < 2:
                made = made._replace(polarity=DENIED)  # "no changes in bowel habits"
        if made.polarity == DENIED and self.padded[i + count].word == "like":
            if self.padded[i + count + 1].word in ("this", "that"):
                made = made._replace(polarity=AFFIRMED)  # "never felt pain like this"
        if self.items[i].word in _NO_ALLERGIES:
            return made._replace(polarity=DENIED)
        if self._denies_within(i, count):  # "can't breathe"
            made = made._replace(polarity=self._polarity_before(i))
        normal = kind == "weak" and meaning.name not in _NEVER_NORMAL
        if normal and made.polarity == AFFIRMED and not self.near(i, _TROUBLE, 7):
            made = made._replace(polarity=NORMAL)
        if made.polarity == AFFIRMED and (self.near(i, _OVER, 8) or self._stops(i + count)):
            made = made._replace(polarity=ENDED)
        if made.polarity == AFFIRMED and not self.spoken and i:
            if self.items[i - 1].word in _ONGOING and self.items[i].gap == "":
                made = made._replace(polarity=CURRENT)
        if made.polarity == AFFIRMED and not self.spoken and self._is_of_before(i):
            made = made._replace(polarity=FORMER)
        if made.polarity == DENIED and self.spoken and self.near(i, _NO_MORE, 8):
            made = made._replace(polarity=ENDED)
        if made.polarity == DENIED and self.spoken:
            if meaning.kind == "diagnosis" and self._is_asked_about(i):
                made = made._replace(polarity=AFFIRMED)
            elif self._not_for_long(i + count):  # "no seizure in years"
                made = made._replace(polarity=ENDED)
        if made.polarity == AFFIRMED and self.spoken and self._used_to(i):
            made = made._replace(polarity=FORMER)
        if made.polarity == DENIED and meaning.name == "pregnancy" and _OCCASION & {*before}:
            made = made._replace(polarity=AFFIRMED)  # "no infections during the pregnancy"
        if made.polarity == DENIED and self._denies_more(i, kind == "diagnosis"):
            made = made._replace(polarity=QUIET)
        if meaning.name in PAINS:
            return made._replace(value="pain", of=PAINS[meaning.name])
        if meaning.name == "pain" and self._is_of_exam(i):
            return made._replace(value="tenderness")
        return made

    def _used_to(self, i: int) -> bool:
        """Whether "used to have" stands close before item i."""
        words = [item.word for item in self.items[max(0, i - 5) : i]]
        return any(
            words[k : k + 2] == ["used", "to"] and set(words[k + 2 :]) & _HAVE
            for k in range(len(words))
        )

    def _in_the_past(self, i: int) -> bool:
        """Whether "in the past" stands close behind item i."""
        for k in range(i + 1, min(i + 6, len(self.items))):
            if self.items[k].word == "past" and self.items[k - 1].word in ("in", "the"):
                return self.padded[k + 1].word == "" or self.padded[k + 1].gap != ""
        return False

    def _stops(self, i: int) -> bool:
        """Whether what ends before item i "stopped" or "went away"."""
        k = i + (self.padded[i].word in ("has", "have", "had", "just", "finally", "all"))
        words = [item.word for item in self.padded[k : k + 2]]
        behind = self.padded[k].gap == "" and self.spoken
        return behind and (words[0] == "stopped" or words in (["went", "away"], ["gone", "away"]))

    def _is_of_before(self, i: int) -> bool:
        """Whether "history of" or the like stands near item i; a "two-week history" goes on."""
        clause = self.context.clause
        for k in range(max(0, i - 6), min(len(self.items), i + 7)):
            if clause[k] == clause[i] and self.items[k].word in _BEFORE:
                if UNITS.get(self.items[k - 1].word if k else "") not in DAYS:
                    return True
        return False

    def _is_asked_about(self, i: int) -> bool:
        """Whether a question takes item i for granted: "how about your asthma, any attacks?"."""
        before = [item.word for item in self.items[max(0, i - 2) : i]]
        has = len(before) > 1 and before[0] in _ABOUT and before[1] in _OWN
        return has and self.context.asks[i]

    def _not_for_long(self, i: int) -> bool:
        """Whether "in years", "in a while" or the like stands at item i."""
        words = [item.word for item in self.padded[i : i + 3]]
        if words[0] not in ("in", "for"):
            return False
        return words[1] in _LONG or words[1:] in (["a", "while"], ["a", "long"])

    def _is_of_exam(self, i: int) -> bool:
        """Whether a pain is one that an examination looks for: "does that hurt?"."""
        if self.spoken:
            return self.context.asks[i] and self.near(i, _PRESSING, 6)
        return self.near(i, _TRIED, 4)

    def _is_heading(self, i: int, count: int) -> bool:
        """Whether a colon stands behind the words from item i on."""
        return self.text[self.items[i + count - 1].end :].lstrip(" *")[:1] == ":"

    def _is_tested(self, i: int, count: int) -> bool:
        """Whether the words from item i on name a test or a vaccine: "HIV test", "flu shot"."""
        following = self.padded[i + count]
        return following.gap == "" and following.word in _TESTED

    def _denies_within(self, i: int, count: int) -> bool:
        words = [item.word for item in self.items[i : i + count]]
        return any(word in NO_WORDS or word.endswith("n't") for word in words)

    def _polarity_before(self, i: int) -> str:
        """The polarity of what stands before item i in its clause, or of the answer to it."""
        context = self.context
        if i and context.clause[i - 1] == context.clause[i]:
            return context.polarity[i - 1]
        return context.polarity[i] if context.asks[i] else AFFIRMED

    def _denies_more(self, i: int, is_diagnosis: bool) -> bool:
        """Whether a note denies more of a thing alone: "no other pain", "no issues with asthma"."""
        before = [item.word for item in self.items[max(0, i - 5) : i]]
        if self.spoken:
            behind = {item.word for item in self.items[i : i + _BESIDES_REACH]}
            return before[-1:] == ["other"] and bool(behind & _BESIDES)
        if _OTHER & set(before[-2:]):
            return True
        return is_diagnosis and bool(_RECENT & set(before)) and bool({"with", "from"} & set(before))

    def _habit(self, found: Found[str], i: int) -> Statement | None:
        word, following = self.padded[i].word, self.padded[i + found.num_items].word
        if following.startswith(("allerg", "intoleran", "reaction", "sensitivit")):
            return None
        made = self._make("habit", found.meaning, i, found.num_items)
        if word in _DENYING:
            return made._replace(polarity=DENIED)
        if word == "sober" and made.polarity == AFFIRMED:
            return made._replace(polarity=ENDED)
        if word.startswith("drink") and self.near(i, _NO_ALCOHOL, 6):
            return None
        if made.polarity == DENIED and self.spoken and self._quit_behind(i):
            return made._replace(polarity=ENDED)
        former = made.polarity == AFFIRMED and self.near(i, _FORMERLY, 4)
        former = former or (made.polarity == AFFIRMED and self._in_the_past(i))
        former = former or (self.spoken and word in _DID_ONCE and self._quit_behind(i))
        if former:
            return made._replace(polarity=FORMER)
        goes_on = made.polarity == AFFIRMED and not self.spoken and self.near(i, _CURRENTLY, 2)
        return made._replace(polarity=CURRENT) if goes_on else made

    def _quit_behind(self, i: int) -> bool:
        """Whether "quit" or "used to" follows in this turn or in the answer: "no, I quit"."""
        turn = self.context.turn
        behind = [k for k in range(i, min(i + 20, len(self.items))) if turn[k] <= turn[i] + 1]
        return any(self.items[k].word in ("quit", "used", "stopped") for k in behind)

    def normal_exams(self) -> set[str]:
        """What the text says is normal: keys of EXAMS, or "all"."""
        return {
            EXAMINED[item.word]
            for i, item in enumerate(self.items)
            if item.word in EXAMINED and self.near(i, NORMAL_WORDS, 9)
        }

    def _amount(self, amount: Amount, i: int) -> Statement | None:
        if not self.spoken and self.items[i].word in ("last", "next", "past"):
            if amount.low == amount.high:
                return None  # "over the last week"; in speech, "next week" may be "in 1 week"
        made = self._make(amount.kind, describe(amount), i, amount.num_items)
        if (made.kind, made.polarity) == ("frequency", DENIED) and not self.spoken:
            if not self._belonging.nearest_drug(i, "frequency"):
                return None  # "does not need daily medication"
        bare = amount.kind == "number" and not amount.unit
        if bare and amount.low < 10 and amount.low == int(amount.low):
            measure = self._measure(i, MEASURES)
            if not measure:
                return None
            made = made._replace(of=measure)
        elif amount.kind == "number" and amount.unit in LABELLED_UNITS:
            made = made._replace(of=self._measure(i, LABELS))
            if (made.of, amount.unit) == ("temperature", ""):
                amount = amount._replace(unit="degree")
        return made._replace(amount=amount)

    def _is_manner(self, amount: Amount, i: int) -> bool:
        """Whether it is "daily activities", or "at night" without a drug."""
        following = self.padded[i + amount.num_items].word
        if amount.kind != "frequency":
            return False
        if i and self.items[i - 1].word in _SPEEDS:
            return True  # "40 miles per hour"
        if following in ("activities", "activity", "living", "life", "routine", "basis", "work"):
            return True
        vague = self.items[i].word in ("at", "in", "before", "on", "the", *FREQUENCY_WORDS)
        return vague and not self.spoken and not self._belonging.nearest_drug(i, "dose")

    def _measure(self, i: int, measures: dict[str, str]) -> str:
        """What the number at item i measures, such as "a1c"; "" for nothing that is known."""
        for k in range(i - 1, max(-1, i - 4), -1):
            bounds = self.context.sentence if measures is LABELS else self.context.clause
            if bounds[k] != bounds[i] or (measures is LABELS and self.items[k].number is not None):
                break
            if self.words[k] in measures:
                return measures[self.words[k]]
            if (self.words[k - 1], self.words[k]) == ("heart", "rate") and measures is LABELS:
                return "pulse"
        return ""
