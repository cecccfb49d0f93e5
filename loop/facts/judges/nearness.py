"""Which of two mentions that say opposite things a statement means: by the words around them."""

import bisect

from ..reading.parsed import Statement
from ..reading.polarity import AFFIRMED, DENIED
from ..statements import Document
from .index import MOST_RIVALS, Index
from .verdicts import CONTRADICTED, Verdict, key_of, place_of

_BEYOND = 0.4  # what a word counts beyond the clause, where one within counts 1
_TELLS_NOTHING = frozenset(
    """the and you your that was has have had for not with she her his him are any can but patient
    okay yeah all right been just know like then there they this from""".split()
)
_SPOKEN_REACH, _WRITTEN_REACH = 12, 8  # items around a mention that tell which one is meant
# How much nearer a mention that contradicts must be than one that supports, chosen on the training
# splits; a word that stands once in the text counts 1.
_MARGINS = {"side": 0.1, "duration": 1.0, "frequency": 1.0}
_MARGIN = 0.5
_PAINFUL = ("pain", "tenderness")
_PLACES = {  # "on the outside" and "bend it" of speech
    word: group.split()[0]
    for group in (
        """medial inside inner; lateral outside outer; proximal; distal; anterior front;
        posterior behind; flexion flex flexing bend bending; extension extend extending straighten;
        supination supinate; pronation pronate; abduction; adduction; midline; umbilical;
        dorsiflexion; inversion; eversion; paraspinal; paravertebral"""
    ).split(";")
    for word in group.split()
}
_PLACE_REACH = 12
_IN_QUESTION = 0.3
_SAME_PART = 0.3  # for a mention of the same part, not of one that it belongs to


def weigh(index: Index, verdict: Verdict, document: Document) -> Verdict:
    """The verdict, where mentions both support and contradict, by the words around them."""
    s = verdict.statement
    elsewhere = _refuted_there(index, s, document)
    if elsewhere:
        return Verdict(s, CONTRADICTED, place_of(elsewhere))
    rivals = index.rivals.get(key_of(s))
    if rivals is None:
        return verdict
    own = _surroundings(document, s)
    same, against = (
        max(
            (_nearness(index, own, o) + _SAME_PART * (o.of == s.of != "") - _asks(index, o), -k)
            for k, o in enumerate(side)
        )
        for side in rivals
    )
    if against[0] > same[0] + _MARGINS.get(s.kind, _MARGIN):
        return Verdict(s, CONTRADICTED, place_of(rivals[1][-against[1]]))
    return verdict._replace(place=place_of(rivals[0][-same[1]]))


def _refuted_there(index: Index, s: Statement, document: Document) -> Statement | None:
    """The mention that alone says of a pain's place, or of a movement, the opposite.

    "Tender over the lateral aspect" against "press on the outside, does that hurt? - No".
    """
    if s.value not in _PAINFUL or s.polarity not in (AFFIRMED, DENIED):
        return None
    at = _places_in(document, s)
    if not at:
        return None
    mentions = index.conditions.get("pain", ())[:MOST_RIVALS]
    there = [o for o in mentions if at & _places_in(index.document, o)]
    opposite = DENIED if s.polarity == AFFIRMED else AFFIRMED
    if there and all(o.polarity == opposite for o in there):
        return there[0]
    return None


def _places_in(document: Document, s: Statement) -> set[str]:
    """The places and movements that the clause of a pain names, close to it."""
    clause = document.context.clause
    near = range(max(0, s.word - _PLACE_REACH), min(len(clause), s.word + _PLACE_REACH))
    names = (_PLACES.get(document.words[k]) for k in near if clause[k] == clause[s.word])
    return {name for name in names if name}


def _asks(index: Index, o: Statement) -> float:
    """What a side loses that stands in a question."""
    asked = o.kind == "side" and index.document.context.asks[o.word]
    return _IN_QUESTION if asked else 0.0


def _nearness(index: Index, own: dict[str, float], o: Statement) -> float:
    """How much of what stands around a statement stands around a mention; rare words most."""
    if o.word not in index.surroundings:
        index.surroundings[o.word] = _surroundings(index.document, o)
    around = index.surroundings[o.word]
    return sum(
        min(own[name], around[name]) / max(1, index.num_places.get(name, 1))
        for name in own.keys() & around.keys()
    )


def _surroundings(document: Document, s: Statement) -> dict[str, float]:
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
