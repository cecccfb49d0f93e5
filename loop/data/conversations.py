"""From rows to conversations. Every row that is read is kept, or listed with file, row, id and what to do; none is lost in silence,
and a patient's words stand in no message."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator

from ..config.schema import Config, ConfigError, DataConfig
from .decontamination import find_near_duplicates
from .readers import MAX_ROW_BYTES, BadRow, columns_of, read_rows
from .soap import has_all_sections, soap_messages

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A checked row as chat messages. dialogue and note are None where the row was a list of messages."""

    id: str
    messages: list[dict[str, str]]
    dialogue: str | None = None
    note: str | None = None
    weight: float = 1.0  # how often an epoch visits it
    numbered: bool = False  # its id is its row's number


def _pick(row: dict, names: list[str]):
    """The first of these columns that the row has."""
    for name in names:
        if name in row:
            return row[name]
    named = all(
        re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", str(key)) for key in row
    )  # else a file without a header: a patient's words stand there
    shown = (
        ", ".join(list(row)[:12])
        if named
        else f"{len(row)} that don't look like names (has the file a header?)"
    )
    raise BadRow(
        f"no column {' or '.join(map(repr, names))}, only {shown}: map it with data.columns"
    )


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}, not a text")
    if not value.strip():
        raise BadRow(f"{name} is empty: fill it or remove the row")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not UTF-8: save the file as UTF-8") from None
    if size > MAX_ROW_BYTES:
        raise BadRow(
            f"{name} has {size / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: split it or remove the row"
        )
    return value


def check_row(row, key: str, data: DataConfig, weight: float = 1.0) -> Conversation:
    """The conversation of a row. Raises BadRow."""
    columns = columns_of(data)
    if "messages" in columns:
        messages = _pick(row, columns["messages"])
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in ROLES for m in messages
        ):
            raise BadRow(
                f"{columns['messages'][0]} must be a list of role ({', '.join(ROLES)}) and content"
            )
        messages = [
            {"role": m["role"], "content": _text(m.get("content"), "a message")} for m in messages
        ]
        if not any(m["role"] == "assistant" for m in messages):
            raise BadRow(f"{columns['messages'][0]} has no assistant's turn, so nothing to learn")
        return Conversation(key, messages, weight=weight)
    dialogue, note = (_text(_pick(row, columns[kind]), kind) for kind in ("dialogue", "note"))
    if data.headings == "required" and not has_all_sections(note):
        raise BadRow(
            "the note lacks S:, O:, A:, P: in this order, each with a text: complete it, or set data.headings=optional"
        )
    return Conversation(key, soap_messages(dialogue, note), dialogue, note, weight)


def _readable(rows: Iterator, where: str) -> Iterator:
    """The rows; a file that can't be read, or no longer, is the user's to mend."""
    try:
        yield from rows
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot be read ({error.strerror or type(error).__name__})"
        ) from error


def _read_sources(data: DataConfig, split: str) -> tuple[list[tuple[Conversation, str]], list[str]]:
    """(conversation, where it stands) of every good row of a split, and a line for every bad one."""
    sources = getattr(data, split)
    sources = [sources] if isinstance(sources, str) else sources or []
    found: dict[str, tuple[Conversation, str]] = {}
    problems, count = [], 0
    for source, weight in zip(
        sources, (data.weights if split == "train" else None) or [1.0] * len(sources), strict=True
    ):
        rows, name = read_rows(source, split, data)
        for number, row in _readable(rows, f"data.{split}={source}"):
            if data.limit and count >= data.limit:
                break
            key, where = None, f"{source}, row {number}"
            try:
                if isinstance(row, BadRow):
                    raise row
                if not isinstance(row, dict):
                    raise BadRow("is not an object with columns")
                # without a column "id", rows are numbered
                key = (
                    _pick(row, columns_of(data)["id"])
                    if "id" in data.columns and data.columns["id"] != "id"
                    else row.get("id")
                )
                numbered = key is None
                key = f"{name}-{count}" if numbered else key
                if not isinstance(key, (str, int)) or not re.fullmatch(r"[^\s]{1,100}", str(key)):
                    raise BadRow(
                        "its id must be a number, or 1 to 100 characters without a space: check data.columns.id"
                    )
                key = str(key)
                where += f" (id {key})"
                if key in found:
                    raise BadRow(f"this id occurs twice, first in {found[key][1]}: make ids unique")
                found[key] = (
                    dataclasses.replace(check_row(row, key, data, weight), numbered=numbered),
                    where,
                )
            except BadRow as problem:
                problems.append(f"{where}: {problem}")
            count += 1
    return list(found.values()), problems


def is_held_out(c: Conversation, share: float) -> bool:
    """Whether it belongs to the held-out share: by a hash of its id, or of what was said where its id is only a number of its row, so that it
    stays there whatever rows come or go around it."""
    key = dialogue_text(c) if c.numbered else c.id
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def read_split(config: Config, split: str) -> tuple[list[Conversation], list[str]]:
    """The conversations of a split ("train", "valid", "test"), and a line for each row left out.

    Without data.valid, valid is the share of train that `is_held_out`. A row of train whose dialogue is also in valid or test, word for
    word or nearly, counts as bad: the figures on those would be recall. Raises ConfigError with the first bad row if data.on_error is stop."""
    data = config.data
    shared = data.valid is None and data.valid_fraction > 0
    rows, problems = _read_sources(data, "train" if split == "valid" and shared else split)
    if split == "valid" and shared:
        return [
            c for c, _ in rows if is_held_out(c, data.valid_fraction)
        ], []  # its bad rows are listed with train's
    if split == "train":
        held_out = [c for c, _ in rows if shared and is_held_out(c, data.valid_fraction)]
        rows = [
            (c, where) for c, where in rows if not (shared and is_held_out(c, data.valid_fraction))
        ]
        for other in ("valid", "test"):
            if getattr(data, other):
                held_out += read_split(config, other)[0]
        leaks = find_near_duplicates(
            [dialogue_text(c) for c, _ in rows], [dialogue_text(c) for c in held_out]
        )
        problems += [
            f"{rows[i][1]}: {how} as that of held-out id {held_out[j].id}: remove one of them"
            for i, j, how in leaks
        ]
        rows = [row for i, row in enumerate(rows) if i not in {leak[0] for leak in leaks}]
    if problems and data.on_error == "stop":
        more = f"and {len(problems) - 1} more; " if len(problems) > 1 else ""
        raise ConfigError(
            f"data.{split}: {problems[0]} ({more}data.on_error=skip leaves them out and lists them)"
        )
    return [c for c, _ in rows], problems


def dialogue_text(c: Conversation) -> str:
    """What an example is recognised by: the dialogue, or what the user said (the system, where a row has no user)."""
    turns = {
        role: "\n".join(m["content"] for m in c.messages if m["role"] == role)
        for role in ("user", "system")
    }
    return c.dialogue if c.dialogue is not None else turns["user"] or turns["system"]


def note_text(c: Conversation) -> str:
    """The note, or the assistant's last message where the row was a list of messages."""
    return (
        c.note
        if c.note is not None
        else [m["content"] for m in c.messages if m["role"] == "assistant"][-1]
    )
