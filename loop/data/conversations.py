"""From the rows of a split's sources to checked conversations.

Every row either becomes a conversation, or a line with its file, row, id and remedy. No message
quotes a row: its words may be a patient's.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from pyarrow import ArrowException

from ..config.schema import Config, ConfigError, DataConfig, TaskConfig
from .decontamination import find_near_duplicates
from .soap import SOAP, has_all_sections, heading_list, normalize_headings, soap_messages
from .sources.locations import columns_of, expand, read_rows, sources_of
from .sources.readers import MAX_ROW_BYTES, BadRow, clean_text

ROLES = ("system", "user", "assistant", "tool")
MAX_LISTED_COLUMNS = 12
# ShareGPT's names of the roles, in any case.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# What looks like nothing, though Unicode counts these among the letters and signs.
INVISIBLE = set("\u034f\u115f\u1160\u2800\u3164\uffa0\ufe0e\ufe0f")


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
    # What stands for each {NAME} of the task's request.
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    headings_changed: int = 0  # by data.normalize_headings


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
        rows, _ = _read_sources(config, "train")  # its bad rows are listed with train's
        return [c for c, _ in rows if is_held_out(c, data.valid_fraction)], []
    rows, problems = _read_sources(config, split)
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


def _read_sources(config: Config, split: str) -> tuple[list[Located], list[str]]:
    """The conversations of all good rows of a split, and a line for every bad row."""
    data = config.data
    found: dict[str, Located] = {}
    problems = []
    for row in _source_rows(data, split):
        where = row.where
        try:
            key, numbered = _row_id(row, data)
            where = f"{where} (id {key})"
            if key in found:
                raise BadRow(f"this id occurs twice, first in {found[key][1]}: make ids unique")
            conversation = check_row(row.content, key, data, row.weight, config.task)
            conversation = dataclasses.replace(conversation, numbered=numbered)
            found[key] = (conversation, where)
        except BadRow as problem:
            problems.append(f"{where}: {problem}")
    return list(found.values()), problems


class Question(NamedTuple):
    """What a note is asked for with."""

    dialogue: str
    fields: dict[str, str]  # what stands for each {NAME} of the task's request


def read_questions(data: DataConfig, split: str, names: Set[str]) -> dict[str, Question]:
    """The dialogues of a split by id, whether or not its rows have notes.

    Ids and texts are those of `read_split`. Raises ConfigError with the first bad row.

    names: of the columns to read into `Question.fields`.
    """
    found: dict[str, Question] = {}
    first: dict[str, str] = {}  # the row of each id
    for row in _source_rows(data, split):
        where = row.where
        try:
            key, _ = _row_id(row, data)
            where = f"{where} (id {key})"
            if key in found:
                raise BadRow(f"this id occurs twice, first in {first[key]}: make ids unique")
            first[key] = row.where.rpartition(", ")[2]
            fields = check_fields(row.content, names, data)
            found[key] = Question(check_dialogue(row.content, data), fields)
        except BadRow as problem:
            raise ConfigError(f"data.{split}={where}: {problem}") from problem
    return found


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
        for name in expand(source, split):
            if data.limit and count >= data.limit:
                return
            rows, split_name = read_rows(name, split, data)
            before = count
            for number, content in _readable(rows, f"data.{split}={name}"):
                if data.limit and count >= data.limit:
                    return
                yield SourceRow(content, f"{name}, row {number}", f"{split_name}-{count}", weight)
                count += 1
            if count == before:
                raise ConfigError(f"data.{split}={name}: holds no rows: fill it or leave it out")


def _readable(rows: Iterator, source: str) -> Iterator:
    """The rows. An OSError or a reader's ConfigError becomes a ConfigError naming the source."""
    try:
        yield from rows
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"{source}: cannot be read ({reason}); copy it again") from error


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
    return check_id(key), numbered


def check_id(key: Any) -> str:
    """The id as a text: a number, or 1 to 100 characters without a blank. Raises BadRow."""
    if isinstance(key, float) and key.is_integer():
        key = int(key)  # as spreadsheets write whole numbers
    number = isinstance(key, (int, float)) and not isinstance(key, bool) and key == key
    if not number and not (isinstance(key, str) and re.fullmatch(r"[^\s\ud800-\udfff]+", key)):
        what = "has blanks" if isinstance(key, str) and key.strip() else "is empty or no text"
        if isinstance(key, str) and re.search("[\ud800-\udfff]", key):
            raise BadRow("its id is not UTF-8, or holds half a surrogate pair: save as UTF-8")
        raise BadRow(
            f"its id must be a number, or 1 to 100 characters without a blank, and {what}: "
            "write _ for blanks, or map another column as data.columns.id"
        )
    if len(str(key)) > 100:
        raise BadRow("its id must be at most 100 characters long: map another as data.columns.id")
    return str(key)


def check_row(
    row: dict, key: str, data: DataConfig, weight: float = 1.0, task: TaskConfig = SOAP
) -> Conversation:
    """The conversation of a row with the id `key`. Raises BadRow."""
    columns = columns_of(data)
    if "messages" in columns:
        return Conversation(key, _check_messages(row, columns["messages"]), weight=weight)
    if "conversations" in columns:
        return Conversation(key, _check_sharegpt(row, columns["conversations"]), weight=weight)
    dialogue = check_dialogue(row, data)
    note = _check_text(_pick(row, columns["note"]), "note")
    changed = 0
    if data.normalize_headings:
        note, changed = normalize_headings(note, task)
    if data.headings == "required" and not has_all_sections(note, task):
        raise BadRow(
            f"the note lacks {heading_list(task)} in this order, each with a text: complete it, "
            "set data.headings=optional, or try data.normalize_headings=true"
        )
    fields = check_fields(row, task.columns, data)
    messages = soap_messages(dialogue, note, task, fields)
    return Conversation(
        key, messages, dialogue, note, weight, fields=fields, headings_changed=changed
    )


def check_fields(row: dict, names: Set[str], data: DataConfig) -> dict[str, str]:
    """What stands for each {NAME} of a request in this row. Raises BadRow.

    names: of the request; each is the column's own name where data.columns names none.
    """
    columns = columns_of(data)
    return {
        name: _check_field(_pick(row, columns.get(name, [name])), name) for name in sorted(names)
    }


def _check_field(value: Any, name: str) -> str:
    """A value as it stands in the request: a text without blanks around it, or a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _check_text(value, name).strip()


def check_dialogue(row: dict, data: DataConfig) -> str:
    """The dialogue of a row, as training and generation read it. Raises BadRow."""
    return _check_text(_pick(row, columns_of(data)["dialogue"]), "dialogue")


def _check_sharegpt(row: dict, names: list[str]) -> list[dict[str, str]]:
    """The chat messages of ShareGPT's `from` and `value`. Raises BadRow."""
    turns = _pick(row, names)
    speakers = [
        SPEAKERS.get(str(turn.get("from")).lower()) if isinstance(turn, dict) else None
        for turn in (turns if isinstance(turns, list) else [None])
    ]
    if None in speakers:
        raise BadRow(
            f"{names[0]} must be a list of from ({', '.join(SPEAKERS)}) and value; "
            "lists of role and content are mapped as data.columns={messages: ...}"
        )
    messages = [{"role": role, "content": t.get("value")} for role, t in zip(speakers, turns)]
    return _check_messages({names[0]: messages}, names)


def _check_messages(row: dict, names: list[str]) -> list[dict[str, str]]:
    """The chat messages in the first of the columns `names`. Raises BadRow."""
    messages = _pick(row, names)
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.get("role") in ROLES for m in messages
    ):
        raise BadRow(
            f"{names[0]} must be a list of role ({', '.join(ROLES)}) and content; "
            "lists of from and value are mapped as data.columns={conversations: ...}"
        )
    messages = [
        {"role": m["role"], "content": _check_text(m.get("content"), "a message")} for m in messages
    ]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow(f"{names[0]} has no assistant's turn, so nothing to learn")
    if messages[0]["role"] == "assistant":
        raise BadRow(
            f"{names[0]} begins with the assistant's turn, which answers nothing: "
            "put the user's before it or remove it"
        )
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
    if not has_words(value):
        raise BadRow(f"{name} is empty: fill it or remove the row")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise BadRow(
            f"{name} is not UTF-8, or holds half a surrogate pair: save as UTF-8"
        ) from None
    if size > MAX_ROW_BYTES:
        raise BadRow(
            f"{name} has {size / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: "
            "split it or remove the row"
        )
    return clean_text(value)


def has_words(text: str) -> bool:
    """Whether a text is more than blanks, control signs and signs of width zero."""
    return any(
        not character.isspace()
        and character not in INVISIBLE
        and unicodedata.category(character) not in ("Cc", "Cf")
        for character in text
    )
