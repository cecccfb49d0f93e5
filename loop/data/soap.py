"""The SOAP task: the one prompt that training and generation share, and the parsing of a note.

Also the shortening of a dialogue that is too long for the model.
"""

import re
from collections.abc import Callable

HEADINGS = ("S", "O", "A", "P")
NAMES = {"S": "Subjective", "O": "Objective", "A": "Assessment", "P": "Plan"}
SYSTEM = (
    "You are a medical scribe. "
    "You turn the conversation of a doctor and a patient into a SOAP note."
)
REQUEST = (
    "Write the SOAP note of this conversation under the headings S:, O:, A: and P:, "
    "in plain text without markdown. State only what was said.\n\n"
)
# "S:", "Subjective:" or "**S:**" at the start of a line. Markdown is tolerated here, so that models
# without fine-tuning are judged on content.
_HEADING = re.compile(
    r"^[ \t>#*_]*(" + "|".join([*HEADINGS, *NAMES.values()]) + r")[ \t*_]*:[ \t*_]*", re.MULTILINE
)


def soap_messages(dialogue: str, note: str | None = None) -> list[dict[str, str]]:
    """The chat messages of one example: system, user and, with a note, the assistant's answer."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": REQUEST + dialogue.strip()},
    ]
    if note is not None:
        messages.append({"role": "assistant", "content": note.strip()})
    return messages


def _split_turns(dialogue: str) -> tuple[list[str], str]:
    """(the turns, what separates them): lines, or sentences where there is only one line."""
    lines = dialogue.strip().splitlines()
    if len(lines) == 1:
        return re.split(r"(?<=[.?!]) ", lines[0]), " "
    return lines, "\n"


def shorten(dialogue: str, turns: int) -> str:
    """The dialogue without `turns` turns from its middle; a marker tells how many are missing.

    The middle, because complaint and history stand at the beginning of a visit, assessment and plan
    at its end. A turn is a line, or a sentence where the dialogue has only one line.
    """
    lines, separator = _split_turns(dialogue)
    turns = min(turns, len(lines))
    if turns == 0:
        return dialogue
    start = (len(lines) - turns + 1) // 2
    marker = f"[{turns} turns left out]"
    return separator.join([*lines[:start], marker, *lines[start + turns :]])


def count_turns(dialogue: str) -> int:
    """The number of turns that `shorten` could remove."""
    lines, _ = _split_turns(dialogue)
    return len(lines)


def fit_dialogue(
    dialogue: str, count_tokens: Callable[[str], int], limit: int
) -> tuple[str, int] | None:
    """(the dialogue, turns left out): without as few turns as bring it to at most `limit` tokens.

    The turns are taken from the middle. None where even the first and the last turn are too long.
    count_tokens: gives the tokens of a dialogue, in whatever prompt the caller puts it.
    """
    if count_tokens(dialogue) <= limit:
        return dialogue, 0
    best = None
    low = 1
    high = count_turns(dialogue) - 2
    while low <= high:
        turns = (low + high) // 2
        shorter = shorten(dialogue, turns)
        if count_tokens(shorter) <= limit:
            best = (shorter, turns)
            high = turns - 1
        else:
            low = turns + 1
    return best


def before_next_heading(text: str) -> str:
    """The text of a section up to the line that begins another section."""
    # The text's own first line follows a heading already, so it must not match as one.
    heading = _HEADING.search("\0" + text)
    return text[: heading.start() - 1] if heading else text


def parse_note(note: str) -> dict[str, str]:
    """The sections of a note by letter, {"S": text, ...}, in the order found.

    Text before the first heading is left out. The texts of a heading that occurs twice are joined.
    A note without headings gives {}.
    """
    headings = list(_HEADING.finditer(note))
    ends = [heading.start() for heading in headings[1:]] + [len(note)]
    bodies: dict[str, list[str]] = {}
    for heading, end in zip(headings, ends):
        bodies.setdefault(heading.group(1)[0], []).append(note[heading.end() : end].strip())
    return {letter: "\n".join(texts) for letter, texts in bodies.items()}


def section_starts(note: str) -> list[tuple[int, str]]:
    """(where its heading begins, its letter) of each section, in the note's order."""
    return [(heading.start(), heading.group(1)[0]) for heading in _HEADING.finditer(note)]


def has_all_sections(note: str) -> bool:
    """Whether S, O, A and P are all there, in this order, each with a text."""
    sections = parse_note(note)
    return tuple(sections) == HEADINGS and all(sections.values())
