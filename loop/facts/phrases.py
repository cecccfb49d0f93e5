"""Finds the longest listed phrase that begins at a word."""

from collections.abc import Iterable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from .numerals import Item

Meaning = TypeVar("Meaning")


class Found(NamedTuple, Generic[Meaning]):
    """A phrase that begins at some item."""

    meaning: Meaning
    num_items: int


class Phrases(Generic[Meaning]):
    """A dictionary of phrases. Plural and singular are the same word."""

    def __init__(self) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], Meaning]]] = {}

    def add(self, phrase: str, meaning: Meaning) -> None:
        """Lists a phrase of lower-case words; a later meaning of the same phrase is dropped."""
        plain = phrase.replace("-", " ").replace("/", " / ")
        forms = [plain]
        if "n't" in plain:  # as transcripts and notes write it
            forms += [plain.replace("n't", " n't")]
        if "can't" in plain:
            forms += [plain.replace("can't", "cannot"), plain.replace("can't", "can not")]
        for form in forms:
            words = tuple(map(singular, form.split()))
            same_first = self._by_first.setdefault(words[0], [])
            if all(rest != words[1:] for rest, _ in same_first):
                same_first.append((words[1:], meaning))
                same_first.sort(key=lambda entry: -len(entry[0]))

    def at(self, items: list[Item], stems: list[str], i: int) -> Found[Meaning] | None:
        """The longest phrase that begins at item i.

        items: with empty ones behind the last. stems: `singular` of each, the digits of a number.
        """
        for rest, meaning in self._by_first.get(stems[i], ()):
            end = i + 1 + len(rest)
            if tuple(stems[i + 1 : end]) == rest and not any(
                item.gap not in ("", "(", ")") for item in items[i + 1 : end]
            ):
                return Found(meaning, end - i)
        return None


_AS_THEY_ARE = frozenset(
    """as aids is was has his this yes us its diabetes herpes pus gas plus less does
    gravis lens chills rales hives measles shingles mumps rickets scabies rabies piles blues bends
    tetanus lupus pancreas feces""".split()
)

_CONTRACTED = frozenset(
    """it's he's she's that's there's here's what's who's how's where's let's one's when's
    everything's""".split()
)


def singular(word: str) -> str:
    """A word without the "s" of a plural, of "hurts" or of "the thyroid's"."""
    if word.endswith("'s") and word not in _CONTRACTED:
        word = word[:-2]
    if len(word) < 4 or word[-1] != "s" or word in _AS_THEY_ARE:
        return word
    if word[-2] in "sui":  # illness, virus, arthritis
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "sses", "xes")) else word[:-1]


def read_table(name: str) -> Iterable[tuple[str, list[str]]]:
    """(what stands before the last ": ", the phrases behind it, split at ";") of each line.

    The file lies in this folder; lines that begin with "#" are comments.
    """
    for line in Path(__file__).with_name(name).read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            key, _, phrases = line.partition(": ")
            yield key.strip(), [phrase.strip() for phrase in phrases.split(";") if phrase.strip()]
