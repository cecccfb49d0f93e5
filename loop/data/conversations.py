"""From the rows of a split's sources to checked conversations.

Every row either becomes a conversation, or a line with its file, row, id and remedy. No message
quotes a row: its words may be a patient's.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from pyarrow import ArrowException

from ..config.schema import Config, ConfigError, DataConfig, TaskConfig
from .decontamination import find_near_duplicates
from .soap import SOAP, has_all_sections, heading_list, normalize_headings, soap_messages
from .sources.cells import check_id, check_text, pick
from .sources.locations import columns_of, expand, read_rows, sources_of
from .sources.readers import BadRow

# The names that a role has in files of OpenAI, ShareGPT, Google or LangChain, in any case.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
}
# Columns beside a chat whose content a prompt would have to show; and what they hold for nothing.
TOOL_COLUMNS = ("tools", "functions", "tool_calls")
NOTHING: tuple = (None, "", "[]", "null", [], {})


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

    The column "id" may be missing or in capitals, but not one that data.columns names.
    """
    content = row.content
    if isinstance(content, BadRow):
        raise content
    if not isinstance(content, dict):
        raise BadRow("is not an object with columns")
    if data.columns.get("id", "id") == "id":
        key = next((content[name] for name in ("id", "ID", "Id") if name in content), None)
    else:
        key = pick(content, columns_of(data)["id"])
    numbered = key is None
    if numbered:
        key = row.default_id
    return check_id(key), numbered


def check_row(
    row: dict, key: str, data: DataConfig, weight: float = 1.0, task: TaskConfig = SOAP
) -> Conversation:
    """The conversation of a row with the id `key`. Raises BadRow."""
    columns = columns_of(data)
    if {"messages", "conversations"} & columns.keys():
        return Conversation(key, _check_chat(row, columns), weight=weight)
    dialogue = check_dialogue(row, data)
    note = check_text(pick(row, columns["note"]), "note")
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
        name: _check_field(pick(row, columns.get(name, [name])), name) for name in sorted(names)
    }


def _check_field(value: Any, name: str) -> str:
    """A value as it stands in the request: a text without blanks around it, or a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return check_text(value, name).strip()


def check_dialogue(row: dict, data: DataConfig) -> str:
    """The dialogue of a row, as training and generation read it. Raises BadRow."""
    return check_text(pick(row, columns_of(data)["dialogue"]), "dialogue")


def _check_chat(row: dict, columns: dict[str, list[str]]) -> list[dict[str, str]]:
    """The chat messages of a row, with the system's text that a column of its own holds.

    Raises BadRow, also for columns that change what the messages mean.
    """
    if "messages" in columns:
        messages = _check_messages(row, columns["messages"])
    else:
        messages = _check_sharegpt(row, columns["conversations"])
    for name in TOOL_COLUMNS:
        if row.get(name) not in NOTHING:
            raise BadRow(f"has {name}, which no prompt shows: remove the column, or the row")
    text = row.get("system")
    if text in NOTHING:
        return messages
    text = check_text(text, "system")
    written = [m["content"].strip() for m in messages if m["role"] == "system"]
    if not written:
        return [{"role": "system", "content": text}, *messages]
    if text.strip() not in written:
        raise BadRow("its column system and its system's turn differ: remove one of them")
    return messages


def _check_sharegpt(row: dict, names: list[str]) -> list[dict[str, str]]:
    """The chat messages of ShareGPT's `from` and `value`. Raises BadRow."""
    turns = pick(row, names)
    roles = _roles_of(turns, "from")
    if "" in roles:
        what = "" if isinstance(turns, list) else f"is {type(turns).__name__} and "
        raise BadRow(
            f"{names[0]} {what}must be a list of from ({', '.join(ROLES)}) and value; "
            "lists of role and content are mapped as data.columns={messages: ...}"
        )
    messages = [{"role": role, "content": t.get("value")} for role, t in zip(roles, turns)]
    return _check_messages({names[0]: messages}, names)


def _roles_of(turns: Any, key: str) -> list[str]:
    """The role of each turn; "" for what is none, and for turns that are no list."""
    return [
        ROLES.get(str(turn.get(key)).strip().lower(), "") if isinstance(turn, dict) else ""
        for turn in (turns if isinstance(turns, list) else [None])
    ]


def _content(message: dict, role: str) -> Any:
    """The content of a chat message; of a list of parts that are texts, their text.

    Raises BadRow for an answer whose training would not be what the row says.
    """
    if role == "assistant" and message.get("weight") == 0:  # OpenAI's sign
        raise BadRow(
            "an answer has the weight 0, and every one is supervised: "
            "end the chat before it, or remove the weight"
        )
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise BadRow(f"an answer has {name}, which are not trained: remove that turn")
    content = message.get("content")
    if isinstance(content, list) and content:
        texts = [
            p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)
        ]
        if len(texts) == len(content):
            return "".join(texts)
    return content


def _check_messages(row: dict, names: list[str]) -> list[dict[str, str]]:
    """The chat messages in the first of the columns `names`. Raises BadRow."""
    messages = pick(row, names)
    roles = _roles_of(messages, "role")
    if "" in roles:
        what = "" if isinstance(messages, list) else f"is {type(messages).__name__} and "
        raise BadRow(
            f"{names[0]} {what}must be a list of role ({', '.join(ROLES)}) and content; "
            "lists of from and value are mapped as data.columns={conversations: ...}"
        )
    messages = [
        {"role": role, "content": check_text(_content(message, role), f"message {i} ({role})")}
        for i, (role, message) in enumerate(zip(roles, messages), 1)
    ]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow(f"{names[0]} has no assistant's turn, so nothing to learn")
    if messages[0]["role"] == "assistant":
        raise BadRow(
            f"{names[0]} begins with the assistant's turn, which answers nothing: "
            "put the user's before it or remove it"
        )
    for before, message in zip([None, *messages], messages):
        if message["role"] == "tool" and (not before or before["role"] in ("system", "user")):
            raise BadRow(
                f"{names[0]} has a tool's turn that no assistant's turn asked for: put that turn "
                "before it or remove it"
            )
    return messages
