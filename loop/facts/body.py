"""Parts of the body, as doctors and patients name them."""

from .phrases import Phrases, read_table

PARTS: Phrases[str] = Phrases()  # the name of the part
WITHIN: dict[str, str] = {}  # what a part belongs to: a thumb to the hand, a hand to the arm
PAIRED: set[str] = set()  # parts of which there are two
UNSIDED = frozenset(("heart", "back", "neck", "throat", "head", "abdomen", "chest", "pelvis"))

for _key, _names in read_table("body.txt"):
    _part, _, _whole = _key.partition("<")
    _part = _part.strip()
    if _whole.strip():
        WITHIN[_part] = _whole.strip()
    if _part not in UNSIDED:
        PAIRED.add(_part)
    for _name in [_part, *_names]:
        PARTS.add(_name, _part)


def same_region(part: str, other: str) -> bool:
    """Whether one part is the other, belongs to it, or both belong to a third directly."""
    return part == other or part in _wholes(other) or other in _wholes(part)


def _wholes(part: str) -> list[str]:
    found = []
    while part in WITHIN:
        part = WITHIN[part]
        found.append(part)
    return found
