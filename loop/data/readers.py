"""From a source to its rows: one reader for each format.

A new format is one generator and one entry in `READERS`, keyed by the file's suffix. A reader takes
a path and yields (row number, row) for each row. In place of a row that can't be read it yields a
`BadRow`, and does not raise it: so no row is lost, and the rows after it are still read.
"""

import csv
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet

from ..config.schema import ROOT, Config, ConfigError, DataConfig
from ..untrusted.datasets import check_data_folder

if TYPE_CHECKING:  # its import takes nearly a second, and files need none of it
    import datasets

# Our name of a split -> the hub's usual name.
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
MAX_ROW_BYTES = 1_000_000  # a long visit has 20 kB; a row of this size is a file in the wrong place


class BadRow(ValueError):
    """What is wrong with a row, and the remedy; never its text."""


Rows = Iterator[tuple[int, dict | BadRow]]  # (row number from 1, the row or what is wrong with it)


def columns_of(data: DataConfig) -> dict[str, list[str]]:
    """data.columns with a list of names for every kind, and "id" where it names none."""
    columns = {"id": "id"} | data.columns
    return {kind: [names] if isinstance(names, str) else names for kind, names in columns.items()}


def sources_of(data: DataConfig, split: str) -> list[str]:
    """The sources that the configuration names for a split ("train", "valid", "test")."""
    sources = getattr(data, split)
    if sources is None:
        return []
    return [sources] if isinstance(sources, str) else sources


def read_json(path: Path) -> Rows:
    """The rows of a JSON object a line, or of one array of objects."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        first = next(file, b"")
        if first.lstrip().startswith(b"["):
            yield from _read_json_array(first + file.read())
            return
        for number, line in enumerate([first, *file], 1):
            if line.strip():
                yield number, _parse_json_line(line)


def _read_json_array(content: bytes) -> Rows:
    try:
        rows = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        yield (
            1,
            BadRow("the file begins with [ and is not one whole JSON array in UTF-8: repair it"),
        )
        return
    yield from enumerate(rows, 1)


def _parse_json_line(line: bytes) -> dict | BadRow:
    if len(line) > MAX_ROW_BYTES:
        return BadRow(
            f"has {len(line) / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: "
            "split it or remove it"
        )
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("is not UTF-8: save the file as UTF-8")
    except (ValueError, RecursionError):
        return BadRow("is not a whole JSON object: repair or remove the line")


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    number = 0
    # Bytes that are not UTF-8 become lone surrogates, which the check of each text finds.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                if None in row or None in row.values():  # more or fewer fields than names
                    yield (
                        number,
                        BadRow(
                            "has another number of fields than the header: quote fields with commas"
                        ),
                    )
                else:
                    yield number, row
        except csv.Error as error:
            yield (
                number + 1,
                BadRow(f"cannot be read as CSV, nor what follows it ({error}): repair the file"),
            )


def _read_parquet(path: Path) -> Rows:
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
        reason = type(error).__name__
        yield (
            number + 1,
            BadRow(f"cannot be read as Parquet, nor what follows it ({reason}): repair the file"),
        )


# By suffix. A reader belongs in this package: the cache is made anew when its source changes.
READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_text_pairs(folder: Path, columns: dict[str, list[str]]) -> Rows:
    """The rows of a folder of NAME.dialogue.txt and NAME.note.txt; NAME is the id."""
    names: set[str] = set()
    for kind in ("dialogue", "note"):
        suffix = f".{kind}.txt"
        names |= {path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")}
    for number, name in enumerate(sorted(names), 1):
        row: dict = {columns["id"][0]: name}
        try:
            for kind in ("dialogue", "note"):
                path = folder / f"{name}.{kind}.txt"
                row[columns[kind][0]] = path.read_bytes().decode("utf-8")
            yield number, row
        except OSError:
            yield (
                number,
                BadRow(f"{path.name} is missing or unreadable: add it, or remove its partner"),
            )
        except UnicodeDecodeError:
            yield number, BadRow(f"{path.name} is not UTF-8: save it as UTF-8")


def locate(source: str, split: str) -> tuple[Path, str, str]:
    """(path, name, split's name at the source) of `NAME` or `NAME:SPLIT`.

    The path does not exist where the name is a hub id. Raises ConfigError for a missing file.
    """
    name = source
    source_split = ""
    if ":" in source and not Path(source).exists():
        name, source_split = source.rsplit(":", 1)
    path = Path(name)
    if not path.exists():
        path = ROOT / name  # what the repository ships is found from any folder
    if path.suffix in READERS and not path.is_file():
        raise ConfigError(f"data.{split}={source}: no such file")
    return path, name, source_split or SPLITS[split]


@functools.lru_cache(maxsize=4)
def _load_dataset(name: str, source_split: str) -> "datasets.Dataset":
    """A split from the hub, or from a folder in its layout."""
    import datasets

    if not Path(name).exists():
        return datasets.load_dataset(name, split=source_split)
    # The library's cache would keep a copy of patients' dialogues in the home folder. A temporary
    # one is removed with this block.
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(name, split=source_split, cache_dir=cache, keep_in_memory=True)


def open_dataset(source: str, split: str) -> "datasets.Dataset":
    """The rows of a source that the datasets library reads.

    Raises ConfigError naming the source.
    """
    path, name, source_split = locate(source, split)
    if path.is_dir():
        check_data_folder(f"data.{split}={source}", path)
    try:
        return _load_dataset(str(path) if path.exists() else name, source_split)
    except Exception as error:  # each of the library's readers raises its own exceptions
        root = _root_cause(error)  # says what is wrong, and where
        if path.exists():
            problem = f"repair the folder ({type(root).__name__})"
        else:
            # A parser's message could quote the data; the file system's and the hub's do not.
            reason = ""
            if isinstance(root, (OSError, LookupError, ValueError)) and str(root):
                reason = f": {str(root).splitlines()[0][:160]}"
            problem = (
                "no such file or folder, and the hub has no answer; point it at a local file or "
                f"folder ({type(root).__name__}{reason})"
            )
        raise ConfigError(f"data.{split}={source}: {problem}") from root


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def read_rows(source: str, split: str, data: DataConfig) -> tuple[Rows, str]:
    """(the numbered rows of a source, the split's name at the source).

    Raises ConfigError naming the source when there is none, or none that fits data.columns.
    """
    path, _, source_split = locate(source, split)
    if path.suffix in READERS:
        return READERS[path.suffix](path), source_split
    if path.is_dir() and any(path.glob("*.dialogue.txt")):
        if "messages" in data.columns:
            raise ConfigError(
                f"data.{split}={source}: a folder of dialogues and notes has no messages; "
                "map dialogue and note in data.columns"
            )
        return _read_text_pairs(path, columns_of(data)), source_split
    return enumerate(open_dataset(source, split), 1), source_split


def digest_sources(config: Config) -> bytes:
    """SHA-256 of every byte that the examples of any split are made from.

    Of sources on the hub, the library's own fingerprint counts. Raises OSError for a file that
    can't be read, ConfigError for a source that is missing.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for source in sources_of(config.data, split):
            path, _, _ = locate(source, split)
            if not path.exists():
                digest.update(open_dataset(source, split)._fingerprint.encode())
            files = [path]
            if not path.is_file():
                files = sorted(p for p in path.rglob("*") if p.is_file())
            for file in files:
                digest.update(f"{source} {file.name} {file.stat().st_size}\n".encode())
                digest.update(file.read_bytes())
    return digest.digest()
