"""From the rows of a split's sources to checked conversations.

Every row either becomes a conversation, or a line with its file, row, id and remedy. No message
quotes a row: its words may be a patient's.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..config.schema import Config, ConfigError, DataConfig
from .decontamination import find_near_duplicates
from .readers import MAX_ROW_BYTES, BadRow, columns_of, read_rows, sources_of
from .soap import has_all_sections, soap_messages

ROLES = ("system", "user", "assistant", "tool")
MAX_LISTED_COLUMNS = 12
NAME = r"[^\s\ud800-\udfff]{1,100}"  # of an example; half a surrogate pair is no character


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A checked row as chat messages.

    dialogue and note are None where the row was a list of messages.
    """

    id: str
    messages: list[dict[str, str]]
    dialogue: str | None = None
    note: str | None = None
    weight: float = 1.0  # how often an epoch visits it
    numbered: bool = False  # its id is the number of its row


class SourceRow(NamedTuple):
    """A row as it was read, not checked yet."""

    content: Any  # of a good row a dict; BadRow where it could not be read
    where: str  # file and row
    default_id: str  # for a row without an id
    weight: float


Located = tuple[Conversation, str]  # a conversation and its file, row and id


def read_split(config: Config, split: str) -> tuple[list[Conversation], list[str]]:
    """The conversations of a split ("train", "valid", "test"), and a line for each bad row.

    Without data.valid, the validation split is the fraction of train that `is_held_out`. A row of
    train whose dialogue is also in valid or test, word for word or nearly, counts as bad: metrics
    on those would measure memory. Raises ConfigError with the first bad row if data.on_error is
    stop.
    """
    data = config.data
    valid_is_from_train = data.valid is None and data.valid_fraction > 0
    if split == "valid" and valid_is_from_train:
        rows, _ = _read_sources(data, "train")  # its bad rows are listed with train's
        return [c for c, _ in rows if is_held_out(c, data.valid_fraction)], []
    rows, problems = _read_sources(data, split)
    if split == "train":
        held_out: list[Conversation] = []
        if valid_is_from_train:
            held_out = [c for c, _ in rows if is_held_out(c, data.valid_fraction)]
            rows = [row for row in rows if not is_held_out(row[0], data.valid_fraction)]
        for other in ("valid", "test"):
            if getattr(data, other):
                held_out += read_split(config, other)[0]
        rows, leaks = _remove_leaks(rows, held_out)
        problems += leaks
    if problems and data.on_error == "stop":
        more = f"and {len(problems) - 1} more; " if len(problems) > 1 else ""
        raise ConfigError(
            f"data.{split}: {problems[0]} ({more}data.on_error=skip leaves them out and lists them)"
        )
    return [c for c, _ in rows], problems


def is_held_out(conversation: Conversation, fraction: float) -> bool:
    """Whether a conversation belongs to the validation fraction of the training rows.

    A hash of its id decides, or of its dialogue where its id is only the number of its row. So it
    stays there, whatever rows are added or removed around it.
    """
    key = dialogue_text(conversation) if conversation.numbered else conversation.id
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def dialogue_text(conversation: Conversation) -> str:
    """The text that identifies an example: the dialogue, or all that the user wrote.

    Where a row of messages has no user, it is the text of the system.
    """
    if conversation.dialogue is not None:
        return conversation.dialogue
    return _text_of_role(conversation, "user") or _text_of_role(conversation, "system")


def _text_of_role(conversation: Conversation, role: str) -> str:
    return "\n".join(m["content"] for m in conversation.messages if m["role"] == role)


def note_text(conversation: Conversation) -> str:
    """The note, or the assistant's last message where the row was a list of messages."""
    if conversation.note is not None:
        return conversation.note
    return [m["content"] for m in conversation.messages if m["role"] == "assistant"][-1]


def _remove_leaks(
    rows: list[Located], held_out: list[Conversation]
) -> tuple[list[Located], list[str]]:
    """(the rows whose dialogue is in no held-out conversation, a line for each of the others)."""
    leaks = find_near_duplicates(
        [dialogue_text(c) for c, _ in rows], [dialogue_text(c) for c in held_out]
    )
    problems = [
        f"{rows[i][1]}: {how} as that of held-out id {held_out[j].id}: remove one of them"
        for i, j, how in leaks
    ]
    leaked = {i for i, _, _ in leaks}
    return [row for i, row in enumerate(rows) if i not in leaked], problems


def _read_sources(data: DataConfig, split: str) -> tuple[list[Located], list[str]]:
    """The conversations of all good rows of a split, and a line for every bad row."""
    found: dict[str, Located] = {}
    problems = []
    for row in _source_rows(data, split):
        where = row.where
        try:
            key, numbered = _row_id(row, data)
            where = f"{where} (id {key})"
            if key in found:
                raise BadRow(f"this id occurs twice, first in {found[key][1]}: make ids unique")
            conversation = check_row(row.content, key, data, row.weight)
            conversation = dataclasses.replace(conversation, numbered=numbered)
            found[key] = (conversation, where)
        except BadRow as problem:
            problems.append(f"{where}: {problem}")
    return list(found.values()), problems


def _source_rows(data: DataConfig, split: str) -> Iterator[SourceRow]:
    """The rows of all sources of a split, at most data.limit.

    Raises ConfigError for a source that is missing or can't be read.
    """
    sources = sources_of(data, split)
    weights = [1.0] * len(sources)
    if split == "train" and data.weights:
        weights = data.weights
    count = 0
    for source, weight in zip(sources, weights, strict=True):
        rows, name = read_rows(source, split, data)
        for number, content in _readable(rows, f"data.{split}={source}"):
            if data.limit and count >= data.limit:
                break
            yield SourceRow(content, f"{source}, row {number}", f"{name}-{count}", weight)
            count += 1


def _readable(rows: Iterator, source: str) -> Iterator:
    """The rows. An OSError while they are read becomes a ConfigError naming the source."""
    try:
        yield from rows
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{source}: cannot be read ({reason})") from error


def _row_id(row: SourceRow, data: DataConfig) -> tuple[str, bool]:
    """(the id of a row, whether that is the default one). Raises BadRow.

    The column "id" may be missing, but not one that data.columns names.
    """
    content = row.content
    if isinstance(content, BadRow):
        raise content
    if not isinstance(content, dict):
        raise BadRow("is not an object with columns")
    if data.columns.get("id", "id") == "id":
        key = content.get("id")
    else:
        key = _pick(content, columns_of(data)["id"])
    numbered = key is None
    if numbered:
        key = row.default_id
    if not isinstance(key, (str, int)) or not re.fullmatch(NAME, str(key)):
        raise BadRow(
            "its id must be a number, or 1 to 100 characters without a space: check data.columns.id"
        )
    return str(key), numbered


def check_row(row: dict, key: str, data: DataConfig, weight: float = 1.0) -> Conversation:
    """The conversation of a row with the id `key`. Raises BadRow."""
    columns = columns_of(data)
    if "messages" in columns:
        return Conversation(key, _check_messages(row, columns["messages"]), weight=weight)
    dialogue = _check_text(_pick(row, columns["dialogue"]), "dialogue")
    note = _check_text(_pick(row, columns["note"]), "note")
    if data.headings == "required" and not has_all_sections(note):
        raise BadRow(
            "the note lacks S:, O:, A:, P: in this order, each with a text: complete it, "
            "or set data.headings=optional"
        )
    return Conversation(key, soap_messages(dialogue, note), dialogue, note, weight)


def _check_messages(row: dict, names: list[str]) -> list[dict[str, str]]:
    """The chat messages in the first of the columns `names`. Raises BadRow."""
    messages = _pick(row, names)
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.get("role") in ROLES for m in messages
    ):
        raise BadRow(f"{names[0]} must be a list of role ({', '.join(ROLES)}) and content")
    messages = [
        {"role": m["role"], "content": _check_text(m.get("content"), "a message")} for m in messages
    ]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow(f"{names[0]} has no assistant's turn, so nothing to learn")
    return messages


def _pick(row: dict, names: list[str]) -> Any:
    """The first of these columns that the row has. Raises BadRow."""
    for name in names:
        if name in row:
            return row[name]
    # In a file without a header, a patient's words stand where the names should be.
    if all(re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", str(name)) for name in row):
        present = ", ".join(list(row)[:MAX_LISTED_COLUMNS])
    else:
        present = f"{len(row)} that don't look like names (has the file a header?)"
    wanted = " or ".join(map(repr, names))
    raise BadRow(f"no column {wanted}, only {present}: map it with data.columns")


def _check_text(value: Any, name: str) -> str:
    """The value, which must be a text with a word in it, in UTF-8 and not huge. Raises BadRow."""
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
            f"{name} has {size / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: "
            "split it or remove the row"
        )
    return value
