"""What a note affirms or denies in words that no table lists, against how a dialogue uses them.

"Reports blood in her stool" is contradicted where the dialogue only denies "blood" and "stool".
Words that the dialogue lacks say nothing: it may put the same thing otherwise.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from .context import Context
from .numerals import Item
from .reading.polarity import AFFIRMED, DENIED

_ENDING = re.compile(
    r"(?<=[a-z]{4})(?:ations?|itions?|ions?|ments?|ings?|ers?|ed|ies|ally|ly|ness|ity|al|es|e|y)$"
)
_MIN_LETTERS = 4
_MOST_PLACES = 30  # of a word with one polarity, so that the time stays linear
_MOST_AFFIRMED = 3  # words of an affirmed run that count: those right behind what affirms them
# They say nothing of what is affirmed or denied.
_EMPTY = frozenset(
    """with history time will been this that past from medical other have having last
    when over next there about than more were also what which while would could should
    some such they them then their these those very well where after before being both
    does doing during each even here into just like made make most much only onto same
    since still upon until through under recent recently currently today present presents
    status significant significantly noted note associated patient deny denies denied
    report reported state stated symptom issue problem concern change sign year month
    week day negative positive difficulty without never neither nothing none exam
    examination taken taking take rate test result night first second again around
    because however between given gave going goes long back down able unable discussed
    recommended prior previous previously evaluation activity any normal normally
    completely appear abnormal abnormality finding found increased decreased right left
    bilateral general constitutional neurological respiratory cardiovascular
    gastrointestinal musculoskeletal psychiatric skin known acute evidence allergic
    allergy continue question answered explained reasoning sure auscultation palpation
    inspection seen free""".split()
)


class Claim(NamedTuple):
    """The telling words of a run that is affirmed or denied as a whole."""

    polarity: str
    items: list[int]  # of the words


def read_claims(items: list[Item], stems: list[str], context: Context) -> Iterator[Claim]:
    """The claims of a text. stems: `singular` of each item."""
    runs = itertools.groupby(
        range(len(items)), key=lambda i: (context.clause[i], context.polarity[i])
    )
    for (_, polarity), run in runs:
        if polarity not in (AFFIRMED, DENIED):
            continue
        telling: list[int] = []
        for i in run:
            if items[i].gap == ":":
                telling = []  # it was a heading
            if tells(items[i], stems[i]):
                telling.append(i)
        if telling and telling[-1] + 1 < len(items) and items[telling[-1] + 1].gap == ":":
            continue
        if polarity == AFFIRMED:
            telling = telling[:_MOST_AFFIRMED]
        if telling:
            yield Claim(polarity, telling)


def tells(item: Item, stem: str) -> bool:
    """Whether a word says what a clause is about; \"with\" and \"patient\" do not."""
    if len(item.word) < _MIN_LETTERS or not item.word.isalpha():
        return False
    return stem not in _EMPTY and item.word not in _EMPTY


@functools.lru_cache(maxsize=100_000)
def _root(word: str) -> str:
    """A word without its ending: "improv" of "improvement", "improve" and "improved"."""
    return _ENDING.sub("", word)


class Usage:
    """How a text uses its words: where each is affirmed, denied, asked and so on."""

    def __init__(self, items: list[Item], stems: list[str], context: Context) -> None:
        self._places: dict[str, dict[str, list[int]]] = {}
        self._clause = context.clause
        self._polarity = context.polarity
        roots = [_root(stem) for stem in stems]
        for i, root in enumerate(roots):
            places = self._places.setdefault(root, {}).setdefault(context.polarity[i], [])
            if len(places) < _MOST_PLACES:
                places.append(i)
        self._claims = {
            (claim.polarity, tuple(roots[i] for i in claim.items))
            for claim in read_claims(items, stems, context)
        }

    def against(self, polarity: str, words: list[str]) -> int | None:
        """The item that contradicts the words; -1 for none, None where none of the words is used.

        The clauses that use the most of the words decide. They contradict where all of these have
        the opposite polarity.
        """
        words = [_root(word) for word in words]
        if (polarity, tuple(words)) in self._claims:
            return -1
        used: dict[tuple[int, str], dict[str, int]] = {}  # by clause and polarity
        for word in dict.fromkeys(words):
            for i in itertools.chain(*self._places.get(word, {}).values()):
                used.setdefault((self._clause[i], self._polarity[i]), {}).setdefault(word, i)
        if not used:
            return None
        most = max(map(len, used.values()))
        best = {key: places for key, places in used.items() if len(places) == most}
        opposite = DENIED if polarity == AFFIRMED else AFFIRMED
        if {found for _, found in best} == {opposite}:
            return min(min(places.values()) for places in best.values())
        return -1
