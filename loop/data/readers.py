"""From a source to its rows: one reader a format. A row that can't be read is handed on as what is wrong with it, in its place."""

import csv
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet

from ..config.schema import ROOT, Config, ConfigError, DataConfig

if TYPE_CHECKING:  # its import takes nearly a second, and files need none of it
    import datasets


SPLITS = {
    "train": "train",
    "valid": "validation",
    "test": "test",
}  # our name -> the hub's usual name
MAX_ROW_BYTES = 1_000_000  # a long visit has 20 kB; a row of this size is a file in the wrong place


def columns_of(data: DataConfig) -> dict[str, list[str]]:
    columns = {"id": "id"} | data.columns
    return {kind: [names] if isinstance(names, str) else names for kind, names in columns.items()}


class BadRow(ValueError):
    """What is wrong with a row, and the remedy; never its text."""


def _json(text: bytes):
    if len(text) > MAX_ROW_BYTES:
        raise BadRow(
            f"has {len(text) / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: split it or remove it"
        )
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("is not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("is not a whole JSON object: repair or remove the line") from None


def read_json(path: Path) -> Iterator[tuple[int, dict | BadRow]]:
    """A JSON object a line, or one array of objects."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        first = next(file, b"")
        if first.lstrip().startswith(b"["):
            try:
                rows = json.loads((first + file.read()).decode("utf-8"))
            except (ValueError, RecursionError):
                yield (
                    1,
                    BadRow(
                        "the file begins with [ and is not one whole JSON array in UTF-8: repair it"
                    ),
                )
                return
            yield from enumerate(rows, 1)
            return
        for number, line in enumerate([first, *file], 1):
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
                yield (
                    number,
                    row
                    if whole
                    else BadRow(
                        "has another number of fields than the header: quote fields with commas"
                    ),
                )
        except csv.Error as error:
            yield (
                number + 1,
                BadRow(f"cannot be read as CSV, nor what follows it ({error}): repair the file"),
            )


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
        yield (
            number + 1,
            BadRow(
                f"cannot be read as Parquet, nor what follows it ({type(error).__name__}): repair the file"
            ),
        )


def _read_pairs(folder: Path, columns: dict[str, list[str]]) -> Iterator[tuple[int, dict | BadRow]]:
    """A folder of NAME.dialogue.txt and NAME.note.txt; NAME is the id."""
    stems = sorted(
        {
            p.name.removesuffix(f".{kind}.txt")
            for kind in ("dialogue", "note")
            for p in folder.glob(f"*.{kind}.txt")
        }
    )
    for number, stem in enumerate(stems, 1):
        row: dict = {columns["id"][0]: stem}
        try:
            for kind in ("dialogue", "note"):
                row[columns[kind][0]] = (folder / f"{stem}.{kind}.txt").read_bytes().decode("utf-8")
            yield number, row
        except OSError:
            yield (
                number,
                BadRow(
                    f"{stem}.{kind}.txt is missing or unreadable: add it, or remove its partner"
                ),
            )
        except UnicodeDecodeError:
            yield number, BadRow(f"{stem}.{kind}.txt is not UTF-8: save it as UTF-8")


READERS = {".jsonl": read_json, ".json": read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def locate(source: str, split: str) -> tuple[Path, str, str]:
    """(path, name, split's name at the source) of `NAME` or `NAME:SPLIT`; the path doesn't exist where the name is a hub id."""
    name, wanted = (
        (source, "") if ":" not in source or Path(source).exists() else source.rsplit(":", 1)
    )
    path = (
        Path(name) if Path(name).exists() else ROOT / name
    )  # what the repository ships is found from any folder
    if path.suffix in READERS and not path.is_file():
        raise ConfigError(f"data.{split}={source}: no such file")
    return path, name, wanted or SPLITS[split]


@functools.lru_cache(maxsize=4)
def _load_dataset(name: str, wanted: str) -> "datasets.Dataset":
    """A split from the hub, or from a folder in its layout."""
    import datasets

    if not Path(name).exists():
        return datasets.load_dataset(name, split=wanted)
    # The library's cache would keep a copy of patients' dialogues in the home folder; a temporary one goes with this block.
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(name, split=wanted, cache_dir=cache, keep_in_memory=True)


def open_dataset(source: str, split: str) -> "datasets.Dataset":
    """The rows of a source that the datasets library reads. Raises ConfigError naming the source."""
    path, name, wanted = locate(source, split)
    try:
        return _load_dataset(str(path) if path.exists() else name, wanted)
    except (
        Exception
    ) as error:  # each reader has its own exceptions; their root cause says what and where
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        # a parser's message could quote the data; one of the file system or the hub does not
        reason = (
            f": {str(root).splitlines()[0][:160]}"
            if isinstance(root, (OSError, LookupError, ValueError)) and str(root)
            else ""
        )
        remedy = (
            "repair the folder"
            if path.exists()
            else "no such file or folder, and the hub has no answer; point it at a local file or folder"
        )
        raise ConfigError(
            f"data.{split}={source}: {remedy} ({type(root).__name__}{'' if path.exists() else reason})"
        ) from root


def read_rows(
    source: str, split: str, data: DataConfig
) -> tuple[Iterator[tuple[int, dict | BadRow]], str]:
    """(row number, row or what is wrong with it) for each row of a source, and the split's name at the source.
    Raises ConfigError naming the source when there is none."""
    path, _, wanted = locate(source, split)
    if path.suffix in READERS:
        return READERS[path.suffix](path), wanted
    if path.is_dir() and any(path.glob("*.dialogue.txt")):
        if "messages" in data.columns:
            raise ConfigError(
                f"data.{split}={source}: a folder of dialogues and notes has no messages; map dialogue and note in data.columns"
            )
        return _read_pairs(path, columns_of(data)), wanted
    return enumerate(open_dataset(source, split), 1), wanted


def digest_sources(config: Config) -> bytes:
    """A hash of every byte that the examples of any split are made from. Hub sources by the library's own fingerprint."""
    digest = hashlib.sha256()
    for split in SPLITS:
        named = getattr(config.data, split)
        for source in [named] if isinstance(named, str) else named or []:
            path, _, _ = locate(source, split)
            if not path.exists():
                digest.update(open_dataset(source, split)._fingerprint.encode())
            for file in (
                [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            ):
                digest.update(
                    f"{source} {file.name} {file.stat().st_size}\n".encode() + file.read_bytes()
                )
    return digest.digest()
