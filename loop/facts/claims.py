"""What a note affirms or denies in words that no table lists, held against how a dialogue uses them.

"Reports blood in her stool" is contradicted where the dialogue only denies "blood" and "stool".
Words that the dialogue lacks say nothing: it may put the same thing otherwise.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from .context import AFFIRMED, DENIED, Context
from .numerals import Item

_MIN_LETTERS = 4
_MOST_AFFIRMED = 3  # words of an affirmed run that count: those right behind what affirms them
# They say nothing of what is affirmed or denied.
_EMPTY = frozenset(
    """with history time will been this that past from medical other have having last when over
    next there about than more were also what which while would could should some such they them
    then their these those very well where after before being both does doing during each even here
    into just like made make most much only onto same since still upon until through under recent
    recently currently today present presents status significant significantly noted note
    associated patient deny denies denied report reported state stated symptom issue problem
    concern change sign year month week day negative positive difficulty without never neither
    nothing none exam examination taken taking take rate test result night first second again around
    because however between given gave going goes long back down able unable discussed recommended
    prior previous previously evaluation activity any normal normally completely appear abnormal
    abnormality finding found increased decreased right left bilateral general constitutional
    neurological respiratory cardiovascular gastrointestinal musculoskeletal psychiatric skin known
    acute evidence continue""".split()
)


class Claim(NamedTuple):
    """The telling words of a run that is affirmed or denied as a whole."""

    polarity: str
    items: list[int]  # of the words


def read_claims(items: list[Item], stems: list[str], context: Context) -> Iterator[Claim]:
    """The claims of a text. stems: `singular` of each item."""
    runs = groupby(range(len(items)), key=lambda i: (context.clause[i], context.polarity[i]))
    for (_, polarity), run in runs:
        if polarity not in (AFFIRMED, DENIED):
            continue
        telling = [i for i in run if _tells(items[i], stems[i])]
        if polarity == AFFIRMED:
            telling = telling[:_MOST_AFFIRMED]
        if telling:
            yield Claim(polarity, telling)


def _tells(item: Item, stem: str) -> bool:
    if item.number is not None or len(item.word) < _MIN_LETTERS:
        return False
    return stem not in _EMPTY and item.word not in _EMPTY


class Usage:
    """How a text uses its words: where each is affirmed, denied, asked and so on."""

    def __init__(self, items: list[Item], stems: list[str], context: Context) -> None:
        self._places: dict[str, dict[str, int]] = {}
        for i in range(len(items)):
            places = self._places.setdefault(stems[i], {})
            places.setdefault(context.polarity[i], i)

    def against(self, polarity: str, words: list[str]) -> int | None:
        """The item that contradicts the words; -1 for none, None where none of the words is used.

        They are contradicted where more than half of those that are used have the opposite polarity
        alone.
        """
        opposite = DENIED if polarity == AFFIRMED else AFFIRMED
        used = [self._places[word] for word in words if word in self._places]
        if not used:
            return None
        only = [places[opposite] for places in used if set(places) == {opposite}]
        return only[0] if 2 * len(only) > len(used) else -1
