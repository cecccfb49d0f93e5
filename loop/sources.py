"""From files to conversations. Every row that is read is kept, or listed with file, row, id and what to do; none is lost in silence,
and a patient's words stand in no message."""

import csv
import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from .config import ROOT, Config, ConfigError, Data
from .leaks import find_leaks
from .soap import has_all_sections, soap_messages

SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # our name -> the hub's usual name
ROLES = ("system", "user", "assistant", "tool")
MAX_ROW_BYTES = 1_000_000  # a long visit has 20 kB; a row of this size is a file in the wrong place


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A checked row as chat messages. dialogue and note are None where the row was a list of messages."""

    id: str
    messages: list[dict[str, str]]
    dialogue: str | None = None
    note: str | None = None
    weight: float = 1.0  # how often an epoch visits it


class BadRow(ValueError):
    """What is wrong with a row, and the remedy; never its text."""


def _json(text: bytes):
    if len(text) > MAX_ROW_BYTES:
        raise BadRow(f"has {len(text) / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: split it or remove it")
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("is not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("is not a whole JSON object: repair or remove the line") from None


def _read_json(path: Path) -> Iterator[tuple[int, dict | BadRow]]:
    """A JSON object a line, or one array of objects."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        lines: Iterator | list = iter(file)
        first = next(lines, b"")
        if first.lstrip().startswith(b"["):
            try:
                rows = json.loads((first + file.read()).decode("utf-8"))
            except (ValueError, RecursionError):
                yield 1, BadRow("the file begins with [ and is not one whole JSON array in UTF-8: repair it")
                return
            yield from enumerate(rows, 1)
            return
        for number, line in enumerate([first, *lines], 1):
            if line.strip():
                try:
                    yield number, _json(line)
                except BadRow as problem:
                    yield number, problem


def _read_csv(path: Path) -> Iterator[tuple[int, dict | BadRow]]:
    csv.field_size_limit(2**31 - 1)
    number = 0
    # Bytes that are no UTF-8 become lone surrogates, which the check of each text names.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                whole = None not in row and None not in row.values()
                yield number, row if whole else BadRow("has another number of fields than the header: quote fields with commas")
        except csv.Error as error:
            yield number + 1, BadRow(f"cannot be read as CSV, nor what follows it ({error}): repair the file")


def _read_parquet(path: Path) -> Iterator[tuple[int, dict | BadRow]]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for i in range(len(batch)):
                number += 1
                try:
                    yield number, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield number, BadRow("is not UTF-8: write the file again from text")
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, BadRow(f"cannot be read as Parquet, nor what follows it ({type(error).__name__}): repair the file")


def _read_pairs(folder: Path, columns: dict[str, list[str]]) -> Iterator[tuple[int, dict | BadRow]]:
    """A folder of NAME.dialogue.txt and NAME.note.txt; NAME is the id."""
    stems = sorted({p.name.removesuffix(f".{kind}.txt") for kind in ("dialogue", "note") for p in folder.glob(f"*.{kind}.txt")})
    for number, stem in enumerate(stems, 1):
        row: dict = {columns["id"][0]: stem}
        try:
            for kind in ("dialogue", "note"):
                row[columns[kind][0]] = (folder / f"{stem}.{kind}.txt").read_bytes().decode("utf-8")
            yield number, row
        except OSError:
            yield number, BadRow(f"{stem}.{kind}.txt is missing or unreadable: add it, or remove its partner")
        except UnicodeDecodeError:
            yield number, BadRow(f"{stem}.{kind}.txt is not UTF-8: save it as UTF-8")


READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def locate(source: str, split: str) -> tuple[Path, str, str]:
    """(path, name, split's name at the source) of `NAME` or `NAME:SPLIT`; the path doesn't exist where the name is a hub id."""
    name, wanted = (source, "") if ":" not in source or Path(source).exists() else source.rsplit(":", 1)
    path = Path(name) if Path(name).exists() else ROOT / name  # what the repository ships is found from any folder
    if path.suffix in READERS and not path.is_file():
        raise ConfigError(f"data.{split}={source}: no such file")
    return path, name, wanted or SPLITS[split]


@functools.lru_cache(maxsize=4)
def _load_dataset(name: str, wanted: str) -> datasets.Dataset:
    """A split from the hub, or from a folder in its layout."""
    if not Path(name).exists():
        return datasets.load_dataset(name, split=wanted)
    # The library's cache would keep a copy of patients' dialogues in the home folder; a temporary one goes with this block.
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(name, split=wanted, cache_dir=cache, keep_in_memory=True)


def open_dataset(source: str, split: str) -> datasets.Dataset:
    """The rows of a source that the datasets library reads. Raises ConfigError naming the source."""
    path, name, wanted = locate(source, split)
    try:
        return _load_dataset(str(path) if path.exists() else name, wanted)
    except Exception as error:  # each reader has its own exceptions; their root cause says what and where
        while error.__cause__ is not None:
            error = error.__cause__
        # a parser's message could quote the data; one of the file system or the hub does not
        reason = f": {str(error).splitlines()[0][:160]}" if isinstance(error, (OSError, LookupError, ValueError)) and str(error) else ""
        remedy = "repair the folder" if path.exists() else "no such file or folder, and the hub has no answer; point it at a local file or folder"
        raise ConfigError(f"data.{split}={source}: {remedy} ({type(error).__name__}{'' if path.exists() else reason})") from error


def read_rows(source: str, split: str, data: Data) -> tuple[Iterator[tuple[int, dict | BadRow]], str]:
    """(row number, row or what is wrong with it) for each row of a source, and the split's name at the source.
    Raises ConfigError naming the source when there is none."""
    path, _, wanted = locate(source, split)
    if path.suffix in READERS:
        return READERS[path.suffix](path), wanted
    if path.is_dir() and any(path.glob("*.dialogue.txt")):
        if "messages" in data.columns:
            raise ConfigError(f"data.{split}={source}: a folder of dialogues and notes has no messages; map dialogue and note in data.columns")
        return _read_pairs(path, _columns(data)), wanted
    return enumerate(open_dataset(source, split), 1), wanted


def _columns(data: Data) -> dict[str, list[str]]:
    columns = {"id": "id"} | data.columns
    return {kind: [names] if isinstance(names, str) else names for kind, names in columns.items()}


def _pick(row: dict, names: list[str]):
    """The first of these columns that the row has."""
    for name in names:
        if name in row:
            return row[name]
    shown = [key if re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", str(key)) else "..." for key in row]  # a file without a header has text there
    raise BadRow(f"no column {' or '.join(map(repr, names))}, only {', '.join(shown[:12])}: map it with data.columns")


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
        raise BadRow(f"{name} has {size / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: split it or remove the row")
    return value


def check_row(row, key: str, data: Data, weight: float = 1.0) -> Conversation:
    """The conversation of a row. Raises BadRow."""
    columns = _columns(data)
    if "messages" in columns:
        messages = _pick(row, columns["messages"])
        if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") in ROLES for m in messages):
            raise BadRow(f"{columns['messages'][0]} must be a list of role ({', '.join(ROLES)}) and content")
        messages = [{"role": m["role"], "content": _text(m.get("content"), "a message")} for m in messages]
        if not any(m["role"] == "assistant" for m in messages):
            raise BadRow(f"{columns['messages'][0]} has no assistant's turn, so nothing to learn")
        return Conversation(key, messages, weight=weight)
    dialogue, note = (_text(_pick(row, columns[kind]), kind) for kind in ("dialogue", "note"))
    if data.headings == "required" and not has_all_sections(note):
        raise BadRow("the note lacks S:, O:, A:, P: in this order, each with a text: complete it, or set data.headings=optional")
    return Conversation(key, soap_messages(dialogue, note), dialogue, note, weight)


def _readable(rows: Iterator, where: str) -> Iterator:
    """The rows; a file that can't be read, or no longer, is the user's to mend."""
    try:
        yield from rows
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror or type(error).__name__})") from error


def _read_sources(data: Data, split: str) -> tuple[list[tuple[Conversation, str]], list[str]]:
    """(conversation, where it stands) of every good row of a split, and a line for every bad one."""
    sources = getattr(data, split)
    sources = [sources] if isinstance(sources, str) else sources or []
    found: dict[str, tuple[Conversation, str]] = {}
    problems, count = [], 0
    for source, weight in zip(sources, (data.weights if split == "train" else None) or [1.0] * len(sources), strict=True):
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
                key = _pick(row, _columns(data)["id"]) if "id" in data.columns and data.columns["id"] != "id" else row.get("id")
                key = f"{name}-{count}" if key is None else key
                if not isinstance(key, (str, int)) or not re.fullmatch(r"[^\s]{1,100}", str(key)):
                    raise BadRow("its id must be a number, or 1 to 100 characters without a space: check data.columns.id")
                key = str(key)
                where += f" (id {key})"
                if key in found:
                    raise BadRow(f"this id occurs twice, first in {found[key][1]}: make ids unique")
                found[key] = (check_row(row, key, data, weight), where)
            except BadRow as problem:
                problems.append(f"{where}: {problem}")
            count += 1
    return list(found.values()), problems


def digest_sources(config: Config) -> bytes:
    """A hash of every byte that the examples of any split are made from. Hub sources by the library's own fingerprint."""
    digest = hashlib.sha256()
    for split in SPLITS:
        named = getattr(config.data, split)
        for source in [named] if isinstance(named, str) else named or []:
            path, _, _ = locate(source, split)
            if not path.exists():
                digest.update(open_dataset(source, split)._fingerprint.encode())
            for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                digest.update(f"{source} {file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.digest()


def is_held_out(key: str, share: float) -> bool:
    """Whether an id belongs to the held-out share: by a hash, so that it stays there whatever rows come or go around it."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def read_split(config: Config, split: str) -> tuple[list[Conversation], list[str]]:
    """The conversations of a split ("train", "valid", "test"), and a line for each row left out.

    Without data.valid, valid is the share of train that `is_held_out`. A row of train whose dialogue is also in valid or test, word for
    word or nearly, counts as bad: the figures on those would be recall. Raises ConfigError with the first bad row if data.on_error is stop."""
    data = config.data
    shared = data.valid is None and data.valid_share > 0
    rows, problems = _read_sources(data, "train" if split == "valid" and shared else split)
    if split == "valid" and shared:
        return [c for c, _ in rows if is_held_out(c.id, data.valid_share)], []  # its bad rows are listed with train's
    if split == "train":
        held_out = [c for c, _ in rows if shared and is_held_out(c.id, data.valid_share)]
        rows = [(c, where) for c, where in rows if not (shared and is_held_out(c.id, data.valid_share))]
        for other in ("valid", "test"):
            if getattr(data, other):
                held_out += read_split(config, other)[0]
        leaks = find_leaks([said(c) for c, _ in rows], [said(c) for c in held_out])
        problems += [f"{rows[i][1]}: {how} as that of held-out id {held_out[j].id}: remove one of them" for i, j, how in leaks]
        rows = [row for i, row in enumerate(rows) if i not in {leak[0] for leak in leaks}]
    if problems and data.on_error == "stop":
        more = f"{len(problems) - 1} more rows are bad; " if len(problems) > 1 else ""
        raise ConfigError(f"data.{split}: {problems[0]} ({more}data.on_error=skip leaves them out and lists them)")
    return [c for c, _ in rows], problems


def said(c: Conversation) -> str:
    """What an example is recognised by: all that is not the answer."""
    return c.dialogue if c.dialogue is not None else "\n".join(m["content"] for m in c.messages if m["role"] == "user")
