"""The task: the one prompt that training and generation share, and the parsing of a note.

Also the shortening of a dialogue that is too long for the model. What the prompt and the headings
are is configuration; `SOAP` is the task of a run that says nothing.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence

from ..config.schema import PLACEHOLDER, TaskConfig

SOAP = TaskConfig()
# A pulse ("P: 80, regular") or a saturation ("S: 98 %") among the findings is no heading.
VITAL_SIGN = (
    r"(?:P[ \t*_]*:[ \t*_]*[~\u2248]?\d{2,3}(?:[ \t]*[-\u2013][ \t]*\d{2,3})?[ \t]*"
    r"(?:$|[,;]|\.[ \t]*$|(?:/|per)[ \t]*min|bpm|beats|\(?(?:ir)?reg|and reg"
    r"|(?:RR?|T|BP|SpO2|Resp)\b)"
    r"|S[ \t*_]*:[ \t*_]*\d{2,3}[ \t]*%)"
)
# Lists whose letters begin a line each: of pain and of history. Theirs are no headings of a note.
MNEMONICS = re.compile(
    "|".join(
        "".join(rf"^[ \t*_>-]*{letter}[ \t*_]*[:-].*(?:\n+|\Z)" for letter in word)
        for word in ("OPQRST", "PQRST", "OLDCARTS", "SAMPLE")
    ),
    re.MULTILINE,
)


def soap_messages(
    dialogue: str,
    note: str | None = None,
    task: TaskConfig = SOAP,
    fields: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """The chat messages of one example: system, user and, with a note, the assistant's answer.

    An empty system text gives no message. fields: what stands for each {NAME} of the request.
    """
    request = PLACEHOLDER.sub(lambda match: (fields or {})[match[1]], task.request)
    messages = [{"role": "user", "content": request + dialogue.strip()}]
    if task.system:
        messages.insert(0, {"role": "system", "content": task.system})
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


@functools.lru_cache(maxsize=8)
def _heading_pattern(spellings: tuple[str, ...]) -> re.Pattern:
    """What matches a heading; its spelling is the group `colon` or `alone`.

    "S:", "Subjective:" or "**S:**" at the start of a line; "PLAN" on a line of its own. The colon
    may be the wide one of Chinese and Japanese, or stand behind a narrow blank as in French.
    Markdown is tolerated, so that models without fine-tuning are judged on content.
    """
    capitals = [text for text in spellings if len(text) > 1 and text.isupper()]
    forms = [rf"(?P<colon>{_one_of(spellings)})[ \t\u00a0\u202f*_]*[:：][ \t*_]*"]
    if capitals:
        forms.append(rf"(?P<alone>{_one_of(capitals)})[ \t*_]*(?=\n)")
    return re.compile(
        rf"^[ \t\u200e\u200f>#*_]*(?!{VITAL_SIGN})(?:{'|'.join(forms)})", re.MULTILINE
    )


def _one_of(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, texts))


def _find_headings(text: str, task: TaskConfig) -> list[tuple[str, int, int]]:
    """(the heading, where it begins, where its section's text does) of each heading in the text."""
    heading_of = {form: heading for heading, forms in task.spellings.items() for form in forms}
    if not heading_of:
        return []
    lists = [match.span() for match in MNEMONICS.finditer(text)]
    found = []
    for match in _heading_pattern(tuple(heading_of)).finditer(text):
        spelling = match["colon"] or match["alone"]
        listed = any(start <= match.start() < end for start, end in lists)
        if len(spelling) > 1 or not listed:
            found.append((heading_of[spelling], match.start(), match.end()))
    return found


def before_next_heading(text: str, task: TaskConfig = SOAP) -> str:
    """The text of a section up to the line that begins another section."""
    # The text's own first line follows a heading already, so it must not match as one.
    found = _find_headings("\0" + text, task)
    return text[: found[0][1] - 1] if found else text


def parse_note(note: str, task: TaskConfig = SOAP) -> dict[str, str]:
    """The sections of a note by heading, {"S": text, ...}, in the order found.

    Text before the first heading is left out. The texts of a heading that occurs twice are joined.
    A note without headings gives {}.
    """
    found = _find_headings(note, task)
    ends = [start for _, start, _ in found[1:]] + [len(note)]
    bodies: dict[str, list[str]] = {}
    for (heading, _, start), end in zip(found, ends):
        bodies.setdefault(heading, []).append(note[start:end].strip())
    return {heading: "\n".join(texts) for heading, texts in bodies.items()}


def section_starts(note: str, task: TaskConfig = SOAP) -> list[tuple[int, str]]:
    """(where its heading begins, the heading) of each section, in the note's order."""
    return [(start, heading) for heading, start, _ in _find_headings(note, task)]


def has_all_sections(note: str, task: TaskConfig = SOAP) -> bool:
    """Whether the task's headings are all there, in this order, each with a text."""
    sections = parse_note(note, task)
    return [*sections] == [*task.headings] and all(sections.values())


def heading_list(task: TaskConfig) -> str:
    """The headings as a message names them: "S:, O:, A:, P:"."""
    return ", ".join(f"{heading}:" for heading in task.headings)


# "A/P", "Assessment and Plan"
JOINT = r"(?:assessment|impression|a)[ \t]*(?:/|&|\+|,|and)[ \t]*(?:plan|p)"
TAG = r"</?(?:b|strong|i|em|u|h[1-6]|p|span|div|li|d[dt])\b[^<>]*>"
CLOSING = r"</(?:b|strong|i|em|u|h[1-6]|p|span|div|li|d[dt])>|<br[ /]*>"
BULLETS = "-\u2022\u00b7\u25aa\u25cf"
WRAPPERS = "*_`[(\u3010<"
BLANKS = " \t\u00a0\u202f\u200b\u200e\u200f\ufeff"
FRAME = re.compile(
    r"^[ \t]*([=~+'-])\1{1,60}[ \t]{0,9}(.{1,80}?)[ \t]{0,9}\1{2,60}(.*)"
)  # "== Plan =="
INITIAL = re.compile(r"^([\s>#-]*)[*_(\[]+([A-Za-z])[*_)\]]+(?=[a-z]{2})")  # "**P**lan"
CELL = re.compile(
    r"^[ \t]*\|[ \t]*([^|:]{1,60}?)[:*_ \t]*\|[ \t]*(.*?)[ \t]*\|?[ \t]*$"
)  # "| Plan | x |"
# A pictogram before a heading.
PICTOGRAMS = "\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff"
RULE = re.compile(r"[ \t]*([=~_^*-])\1{2,}[ \t]*")  # what underlines a heading


@functools.lru_cache(maxsize=8)
def _styled_pattern(spellings: tuple[str, ...]) -> re.Pattern:
    """A line that begins a section in somebody's own style.

    "Subjective:", "**S:**", "## Plan", "S -", "1. Objective:", "<b>Plan</b>", "[A]", "Plan (P):",
    "A/P:", "Assessment and Plan:".
    """
    names = _one_of(sorted(spellings, key=len, reverse=True))
    joint = f"(?P<joint>{JOINT})|" if {"A", "P"} <= {*spellings} else ""
    return re.compile(
        rf"(?P<mark>(?:[{BULLETS}{BLANKS}{PICTOGRAMS}>#*_]|{TAG}){{0,40}})"
        rf"(?P<number>\(?(?:\d{{1,2}}|[IVX]{{1,4}}|[a-d](?=\)))[.)][{BLANKS}]*)?"
        rf"(?P<open>(?:[*_`\[(\u3010]|{TAG}){{0,10}})"
        rf"(?P<name>{joint}{names})(?:[ \t]*[(/][ \t]*(?P<again>{names})\)?)?"
        rf"(?P<close>(?:[{BLANKS}*_`\])\u3011#]|{CLOSING}){{0,40}})"
        r"(?P<end>[:\uff1a]+|[-\u2013\u2014](?=\s|$)|->|\u2192|=|\)|\.(?=\s|$)|)"
        rf"(?:[{BLANKS}*_]|{CLOSING}){{0,40}}(?P<text>.*)",
        re.IGNORECASE,
    )


def _heading_in(line: str, task: TaskConfig, following: str | None) -> tuple[str, str] | None:
    """(the heading that a line begins, the text behind it); None where it begins no section.

    following: the next heading in order. One of a single letter without a colon must be this one,
    and so must a word whose sign could also be another's.
    """
    heading_of = {form.casefold(): h for h, forms in task.spellings.items() for form in forms}
    line = CELL.sub(r"**\1**: \2", line)
    line = INITIAL.sub(r"\1\2", FRAME.sub(r"**\2**\3", line, count=1))
    match = _styled_pattern(tuple(f for o in task.spellings.values() for f in o)).fullmatch(line)
    if not match or re.match(VITAL_SIGN, line[match.start("name") :]):
        return None
    name, end, text = match["name"], match["end"], match["text"]
    opened = any(sign in WRAPPERS for sign in match["mark"] + match["open"])
    close = match["close"].strip(BLANKS + "#")
    if not end and not opened and close == ")":
        end, close = close, ""
    heading = "A" if match.groupdict().get("joint") else heading_of.get(name.casefold())
    again = match["again"]
    if not heading or (again and heading_of.get(again.casefold()) != heading):
        return None  # regular expressions fold more letters
    colon = end.startswith((":", "\uff1a"))
    closed = opened and close
    if not end and text and not closed:
        return None  # a sentence that begins with the word
    is_next = heading == following
    if end in (".", ")", "=", "->", "\u2192") and not (is_next and len(name) > 1):
        return None
    if len(name) == 1:
        marked = match["mark"].strip(BLANKS) or match["number"] or end or closed
        listed = any(sign in BULLETS for sign in match["mark"])
        if name.islower() or not ((colon and not listed) or (is_next and marked)):
            return None
    elif (end or text) and not colon and name[0].islower():
        return None  # "plan - as before" goes on with a sentence
    return heading, text


def _without_repeated(heading: str, text: str, task: TaskConfig) -> str:
    """The text behind a heading without another spelling of it, as in "S: Subjective: cough"."""
    forms = _one_of(sorted(task.spellings[heading], key=len, reverse=True))
    return re.sub(rf"^[*_]*(?:{forms})[*_]*[ \t]*(?:[:\uff1a][*_ \t]*|$)", "", text)


def _split_inline(line: str, task: TaskConfig) -> list[str]:
    """The sections of a line that holds all of them, as in "S: cough O: T 37 A: cold P: rest".

    [line] where it lacks a heading with a colon, or has them in another order.
    """
    signs = rf"(?:[\s;|*_]|{TAG}|<br[ /]*>)"
    at, bounds = 0, []
    for number, forms in enumerate(task.spellings.values()):
        names = _one_of(sorted(forms, key=len, reverse=True))
        before = rf"{signs}{{0,40}}" if number == 0 else rf"{signs}{{1,40}}"
        pattern = rf"{before}(?!{VITAL_SIGN})(?:{names}){signs}{{0,40}}[:\uff1a]{signs}{{0,40}}"
        found = re.compile(pattern)
        match = found.match(line) if number == 0 else found.search(line, at)
        if not match:
            return [line]
        bounds.append(match.span())
        at = match.end()
    ends = [start for start, _ in bounds[1:]] + [len(line)]
    return [
        f"{heading}: {line[start:end].strip()}".rstrip()
        for heading, (_, start), end in zip(task.headings, bounds, ends)
    ]


def normalize_headings(note: str, task: TaskConfig = SOAP) -> tuple[str, int]:
    """(the note with the task's headings written "S: text", how many were written otherwise).

    A heading of one letter without a colon counts where it is the next one in order, so a pulse
    among the findings stays there. A joint "Assessment and Plan" becomes A, up to a line that
    begins P: nothing says which of its sentences is which.
    """
    lines: list[str] = []
    note, changed = _from_json_or_tags(note.strip(), task)
    for line in note.split("\n"):
        sections = _split_inline(line, task)
        lines += sections
        changed += len(sections) if len(sections) > 1 else 0
    lists = _listed_lines(lines)
    order = [*task.headings, None]
    following = order[0]
    for i, line in enumerate(lines):
        found = None if i in lists else _heading_in(line, task, following)
        if found is None:
            continue
        heading, text = found
        following = order[order.index(heading) + 1]
        text = _without_repeated(heading, text, task)
        if not text and i + 1 < len(lines) and RULE.fullmatch(lines[i + 1]):
            lines[i + 1] = ""
        written = f"{heading}: {text}".rstrip()
        if written != line.rstrip():
            lines[i] = written
            changed += 1
    return "\n".join(lines), changed


def _from_json_or_tags(note: str, task: TaskConfig) -> tuple[str, int]:
    """A note that is a JSON object, or in XML's tags, as "S: text"; and how many headings it had.

    (note, 0) where it is neither, or one of its keys or values is no heading or text.
    """
    heading_of = {form.casefold(): h for h, forms in task.spellings.items() for form in forms}
    sections: list[tuple[str, str]] = []
    if note.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(note)
            if all(isinstance(text, str) for text in found.values()):
                sections = [*found.items()]
    elif note.startswith("<"):
        names = _one_of(sorted(heading_of, key=len, reverse=True))
        element = re.compile(rf"<({names})>\s*(.*?)\s*</\1>\s*", re.IGNORECASE | re.DOTALL)
        note_element = re.fullmatch(r"<(note|soap)>\s*(.*?)\s*</\1>", note, re.I | re.DOTALL)
        inner = note_element[2] if note_element else note
        if names and not element.sub("", inner):
            sections = element.findall(inner)
    if not sections or any(name.casefold() not in heading_of for name, _ in sections):
        return note, 0
    lines = [f"{heading_of[name.casefold()]}: {text.strip()}".rstrip() for name, text in sections]
    return "\n".join(lines), len(lines)


def _listed_lines(lines: list[str]) -> set[int]:
    """The numbers of the lines that belong to one of `MNEMONICS`."""
    text = "\n".join(lines)
    found: set[int] = set()
    for match in MNEMONICS.finditer(text):
        first = text.count("\n", 0, match.start())
        found |= set(range(first, first + match[0].count("\n") + 1))
    return found
