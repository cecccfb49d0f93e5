"""The SOAP task itself: the one prompt that training and generation share, and how a note is taken apart again."""

import re
from collections.abc import Callable

HEADINGS = ("S", "O", "A", "P")
NAMES = {"S": "Subjective", "O": "Objective", "A": "Assessment", "P": "Plan"}
SYSTEM = "You are a medical scribe. You turn the conversation of a doctor and a patient into a SOAP note."
REQUEST = "Write the SOAP note of this conversation under the headings S:, O:, A: and P:, in plain text without markdown. State only what was said.\n\n"
# "S:", "Subjective:", "**S:**" at the start of a line; markdown is tolerated here so that untuned models are judged on content.
_HEADING = re.compile(
    r"^[ \t>#*_]*(" + "|".join([*HEADINGS, *NAMES.values()]) + r")[ \t*_]*:[ \t*_]*", re.MULTILINE
)


def soap_messages(dialogue: str, note: str | None = None) -> list[dict[str, str]]:
    """The chat messages of one example: system, user and, when `note` is given, the assistant's answer."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": REQUEST + dialogue.strip()},
    ]
    return messages if note is None else [*messages, {"role": "assistant", "content": note.strip()}]


def shorten(dialogue: str, turns: int) -> str:
    """The dialogue without that many turns from its middle, a marker in their place. The middle, because complaint and history stand at
    the beginning of a visit, assessment and plan at its end. A turn is a line, or a sentence where the dialogue has only one line."""
    lines, joint = dialogue.strip().splitlines(), "\n"
    if len(lines) == 1:
        lines, joint = re.split(r"(?<=[.?!]) ", lines[0]), " "
    turns = min(turns, len(lines))
    start = (len(lines) - turns + 1) // 2
    return (
        joint.join([*lines[:start], f"[{turns} turns left out]", *lines[start + turns :]])
        if turns
        else dialogue
    )


def count_turns(dialogue: str) -> int:
    """The turns that `shorten` could remove."""
    lines = dialogue.strip().splitlines()
    return len(lines) if len(lines) > 1 else len(re.split(r"(?<=[.?!]) ", lines[0]))


def fit_dialogue(
    dialogue: str, count_tokens: Callable[[str], int], limit: int
) -> tuple[str, int] | None:
    """(the dialogue, turns left out): without as few turns from its middle as make `count_tokens` of it at most `limit`. None where even the
    first and the last turn are too long."""
    if count_tokens(dialogue) <= limit:
        return dialogue, 0
    low, high, best = 1, count_turns(dialogue) - 2, None
    while low <= high:
        turns = (low + high) // 2
        shorter = shorten(dialogue, turns)
        if count_tokens(shorter) <= limit:
            best, high = (shorter, turns), turns - 1
        else:
            low = turns + 1
    return best


def before_next_heading(text: str) -> str:
    """What a section's text holds before a line begins another section."""
    mark = _HEADING.search("\0" + text)  # the text's own first line follows a heading already
    return text[: mark.start() - 1] if mark else text


def parse_note(note: str) -> dict[str, str]:
    """Splits a note at its headings: {"S": text, ...} in the order found. Text before the first heading is left out,
    a heading that comes twice has its texts joined, and a text without headings gives {}."""
    marks = list(_HEADING.finditer(note))
    sections: dict[str, str] = {}
    for mark, following in zip(marks, [*marks[1:], None]):
        body = note[mark.end() : following.start() if following else len(note)].strip()
        letter = mark.group(1)[0]
        sections[letter] = f"{sections[letter]}\n{body}" if letter in sections else body
    return sections


def has_all_sections(note: str) -> bool:
    """True when S, O, A and P are all there, in this order, each with a text."""
    sections = parse_note(note)
    return tuple(sections) == HEADINGS and all(sections.values())
