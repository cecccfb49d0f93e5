"""From a file to its rows: one reader for each format.

A new format is one generator and one entry in `READERS`, keyed by the file's suffix. A reader takes
a path and yields (row number, row) for each row. In place of a row that can't be read it yields a
`BadRow`, and does not raise it: so no row is lost, and the rows after it are still read. Which file
a source means stands in locations.py.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet

from ...config.schema import ConfigError

MAX_ROW_BYTES = 1_000_000  # a long visit has 20 kB; a row of this size is a file in the wrong place
MOST_NULS = 15  # in the first 64 bytes of a text; UTF-16 without its mark has twice as many
MOST_AT_ONCE = 2**30  # bytes, of a file that can't be read row by row
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)  # of compressed files
# How files begin that are no text, whatever their names say.
NO_TEXT = {
    b"\x1f\x8b": "compressed: put .gz behind its name",
    b"BZh": "compressed: put .bz2 behind its name",
    b"\xfd7zXZ": "compressed: put .xz behind its name",
    b"PK\x03\x04": "an Excel workbook or a zip file: name it .xlsx, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file: save it as CSV",
    b"PAR1": "Parquet: name it .parquet",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"ARROW1": "Feather or Arrow: write it as Parquet",
    b"SQLite format 3": "a database: export its table as CSV",
    b"%PDF": "a PDF: copy its texts into a table",
    b"{\\rtf": "a document in RTF: copy its texts into a table",
    b"<!DOCTYPE html": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file by git lfs pull",
    codecs.BOM_UTF32_LE: "in UTF-32: save it as UTF-8",
    codecs.BOM_UTF32_BE: "in UTF-32: save it as UTF-8",
}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
EXCEL_ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")  # a character that XML can't hold


class BadRow(ValueError):
    """What is wrong with a row, and the remedy; never its text."""


Rows = Iterator[tuple[int, dict | BadRow]]  # (row number from 1, the row or what is wrong with it)


def format_of(path: Path) -> str:
    """The suffix that names a file's format, lower case: ".jsonl" of NOTES.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark, as Windows writes them.

    Line breaks become those of Unix. Raises UnicodeDecodeError.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return clean_text(content.decode("utf-16" if utf16 else "utf-8-sig"))


def clean_text(text: str) -> str:
    """The text without a byte order mark, with the line breaks of Unix."""
    text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its last suffix says so."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _check_is_text(start: bytes) -> None:
    """Raises BadRow where a file that begins so is no text in UTF-8, or in UTF-16 with its mark."""
    for magic, what in NO_TEXT.items():
        if start.startswith(magic):
            raise BadRow(f"is not read, nor what follows it: the file is {what}")
    if start.count(b"\0") > MOST_NULS and not start.startswith(UTF16):
        raise BadRow("is not read, nor what follows it: the file has NULs, save it as UTF-8")


def read_json(path: Path) -> Rows:
    """The rows of a JSON object a line, or of one array of objects."""
    number = 0
    try:
        with _open(path) as file:
            start = file.read(64)
            if start.startswith(UTF16) and not start.startswith(codecs.BOM_UTF32_LE):
                yield 1, BadRow("is UTF-16, nor is what follows it read: save the file as UTF-8")
                return
            _check_is_text(start)
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            first = file.readline(MAX_ROW_BYTES + 1)
            while first and not first.strip():
                number += 1
                first = file.readline(MAX_ROW_BYTES + 1)
            if first.lstrip().startswith(b"["):
                yield from _read_json_array(first + _read_rest(file))
                return
            for number, line in enumerate(_lines(file, first), number + 1):
                if isinstance(line, BadRow):
                    yield number, line
                elif line.strip():
                    yield number, _parse_json_line(line)
    except DAMAGED as error:
        yield number + 1, _damaged(error)
    except BadRow as problem:
        yield number + 1, problem


def _lines(file: BinaryIO, line: bytes) -> Iterator[bytes | BadRow]:
    """The lines of a file from its first on. One above MAX_ROW_BYTES is never whole in memory, as
    a small compressed file can hold a line of many GB.
    """
    while line:
        size = len(line)
        if size > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES + 1)
                size += len(line)
            yield BadRow(
                f"has {size / 1e6:.1f} MB, more than {MAX_ROW_BYTES / 1e6:.0f} MB: "
                "split it or remove it"
            )
        else:
            yield line
        line = file.readline(MAX_ROW_BYTES + 1)


def _read_rest(file: BinaryIO) -> bytes:
    """All that is left of a file. Raises BadRow where that is more than MOST_AT_ONCE."""
    rest = file.read(MOST_AT_ONCE + 1)
    if len(rest) > MOST_AT_ONCE:
        raise BadRow(
            f"is not read, nor what follows it: the file has more than {MOST_AT_ONCE / 2**30:g} "
            "GiB, write a JSON object a line (.jsonl), or Parquet without a .gz around it"
        )
    return rest


def _damaged(error: Exception) -> BadRow:
    return BadRow(
        f"cannot be decompressed, nor what follows it ({type(error).__name__}): copy the file "
        "again, or correct its name"
    )


def _read_json_array(content: bytes) -> Rows:
    try:
        rows = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except BadRow as problem:
        yield 1, BadRow(f"of the array at least one object {problem}")
        return
    except (ValueError, RecursionError):
        yield (
            1,
            BadRow("the file begins with [ and is not one whole JSON array in UTF-8: repair it"),
        )
        return
    yield from enumerate(rows, 1)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("names a key twice: rename or remove one")
    return row


def _parse_json_line(line: bytes) -> dict | BadRow:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
    except BadRow as problem:
        return problem
    except UnicodeDecodeError:
        return BadRow("is not UTF-8: save the file as UTF-8")
    except (ValueError, RecursionError):
        return BadRow(
            "is not a whole JSON object: repair or remove the line; a file has one object a line, "
            "or is one array of objects"
        )


def _read_csv(path: Path) -> Rows:
    """The rows of values with commas, semicolons, tabs or bars between, as Excel writes them too.

    The header tells the separator, or a line `sep=;` before it.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    number = 0
    with _open(path) as raw:
        try:
            start = raw.read(64)
            _check_is_text(start)
            raw.seek(0)
            utf16 = start.startswith(UTF16)
            # Bytes that are not UTF-8 become lone surrogates, which the check of each text finds.
            file = io.TextIOWrapper(
                raw,
                encoding="utf-16" if utf16 else "utf-8-sig",
                errors="replace" if utf16 else "surrogateescape",
                newline="",
            )
            lines: Iterator[str] = itertools.dropwhile(
                lambda line: not line.strip(), _text_lines(file)
            )
            first = next(lines, "")
            named = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
            if named:
                delimiter = named.group(1)
            else:
                lines = itertools.chain([first], lines)
                header = re.sub(r'"[^"]*"', "", first)
                # The comma comes first, so that it wins a tie.
                delimiter = max(",;\t|", key=header.count)
                if format_of(path) == ".tsv":
                    delimiter = "\t"
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            # A line of separators alone is what Excel writes of a row that was emptied.
            for number, row in _with_header(row for row in reader if any(map(str.strip, row))):
                yield number, row
        except BadRow as problem:
            yield 1, problem
        except csv.Error as error:
            yield (
                number + 1,
                BadRow(
                    f"cannot be read as CSV, nor what follows it ({error}): repair the file; "
                    "in a quoted field a quote is written twice"
                ),
            )
        except DAMAGED as error:
            yield number + 1, _damaged(error)


def _text_lines(file: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file. Raises csv.Error for one above MAX_ROW_BYTES."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise csv.Error(f"a line of more than {MAX_ROW_BYTES / 1e6:.0f} MB")
        yield line


def _with_header(lines: Iterable[Any]) -> Rows:
    """The rows of a table whose first line names the columns. Those without a name are not read."""
    lines = iter(lines)
    header = next(lines, None)
    if header is None:
        return
    header = [name.strip() if isinstance(name, str) else name for name in header]
    named = [i for i, name in enumerate(header) if name != ""]  # others are not read
    if len({header[i] for i in named}) < len(named):
        yield 1, BadRow("cannot be read: the header names a column twice: rename one of them")
        return
    for number, fields in enumerate(lines, 1):
        if isinstance(fields, BadRow):
            yield number, fields
            continue
        surplus = fields[len(header) :]
        if fields[: len(header)] == header:
            yield number, BadRow("repeats the header: remove the line")
        elif all({*str(field)} == {"-"} for field in fields):  # as sqlcmd draws below a header
            yield number, BadRow("is a line of dashes: remove it")
        elif len(fields) >= len(header) and not any(surplus):
            yield number, {header[i]: fields[i] for i in named}
        else:
            remedy = "complete or remove the line"
            if len(fields) > len(header):
                remedy = "quote fields that hold the separator"
            if len(header) == 1:
                remedy = "remove what stands before the line that names the columns"
            yield (
                number,
                BadRow(
                    f"has another number of fields than the header ({len(fields)}, not "
                    f"{len(header)}): {remedy}"
                ),
            )


def _read_xlsx(path: Path) -> Rows:
    """The rows of the first sheet of an Excel workbook. Raises ConfigError without openpyxl."""
    try:
        import openpyxl
    except ImportError:
        raise ConfigError(
            "Excel workbooks need the package openpyxl: save the sheet as CSV, or type "
            f"{sys.executable} -m pip install openpyxl"
        ) from None
    number = 0
    try:
        with _open(path) as file:
            _check_size_unpacked(file)
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            sheet = _first_sheet(book)
            hidden = _hidden_rows(file, sheet)
            for number, row in _with_header(_lines_of_sheet(sheet, hidden)):
                yield number, row
            if not number and len(book.worksheets) > 1:
                raise BadRow(
                    "is not there: the first sheet has none, and it alone is read: move the sheet "
                    "with the rows to the front"
                )
    except BadRow as problem:
        yield 1, problem
    except Exception as error:  # the package raises those of zip, XML and its own
        yield (
            number + 1,
            BadRow(
                f"cannot be read as an Excel workbook, nor what follows it "
                f"({type(error).__name__}): save it again, or as CSV"
            ),
        )


def _first_sheet(book: Any) -> Any:
    """The first sheet of cells that a person sees. Raises BadRow where all are hidden."""
    for sheet in book.worksheets:
        if sheet.sheet_state == "visible":
            return sheet
    raise BadRow("is not there: all sheets are hidden, show the one with the rows")


def _hidden_rows(file: BinaryIO, sheet: Any) -> set[int]:
    """The numbers of the rows that a person does not see, as behind a filter."""
    with zipfile.ZipFile(file) as packed, packed.open(sheet._worksheet_path) as xml:
        found = set()
        for _, element in ElementTree.iterparse(xml):
            if element.tag.endswith("}row"):
                if element.get("hidden") in ("1", "true"):
                    found.add(int(element.get("r", 0)))
                element.clear()
        return found


def _lines_of_sheet(sheet: Any, hidden: set[int]) -> Iterator[list | BadRow]:
    """The cells of each row that has some, all rows as long as the first of them.

    The first names the columns. Of the others, one that is hidden is a BadRow.
    """
    width = 0
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        line = [_cell_value(cell) for cell in cells]
        if not any(value != "" for value in line):
            continue
        if width and number in hidden:
            yield BadRow(f"is hidden in the workbook (line {number}): show it or delete it")
            continue
        width = width or len(line)
        yield line + [""] * (width - len(line))


def _cell_value(cell: Any) -> Any:
    if isinstance(cell, str):
        return EXCEL_ESCAPE.sub(lambda found: chr(int(found[1], 16)), cell)
    return "" if cell is None else cell


def _check_size_unpacked(file: BinaryIO) -> None:
    """Raises BadRow for a workbook, a zip file, that unpacks to more than MOST_AT_ONCE."""
    with zipfile.ZipFile(file) as packed:
        size = sum(part.file_size for part in packed.infolist())
    if size > MOST_AT_ONCE:
        raise BadRow(
            f"is not read, nor what follows it: the workbook unpacks to {size / 2**30:.1f} GiB, "
            "save its rows as CSV"
        )
    file.seek(0)


def _check_is_parquet(path: Path) -> None:
    """Raises BadRow where a file begins as one of another kind does."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith(b"PAR1"):
        _check_is_text(start)


def _read_parquet(path: Path) -> Rows:
    number = 0
    source: Path | io.BytesIO = path
    try:
        if path.suffix.lower() in OPENERS:  # it is read from its end, so all of it
            with _open(path) as packed:
                source = io.BytesIO(_read_rest(packed))
        else:
            _check_is_parquet(path)
        file = pyarrow.parquet.ParquetFile(source)
        names = file.schema_arrow.names
        if len({*names}) < len(names):
            raise BadRow("cannot be read: the file names a column twice: rename one of them")
        for batch in file.iter_batches(1024):
            for i in range(len(batch)):
                number += 1
                try:
                    yield number, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield number, BadRow("is not UTF-8: write the file again from text")
                except (ValueError, OverflowError):  # a date or a time zone that Python lacks
                    yield number, BadRow("has a date or a number that can't be read: correct it")
    except BadRow as problem:
        yield 1, problem
    except DAMAGED as error:
        yield number + 1, _damaged(error)
    except (pyarrow.ArrowException, OSError) as error:
        reason = type(error).__name__
        yield (
            number + 1,
            BadRow(f"cannot be read as Parquet, nor what follows it ({reason}): repair the file"),
        )


# By suffix. A reader belongs in this package: the cache is made anew when its source changes.
READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": _read_xlsx,
    ".parquet": _read_parquet,
}


def read_text_pairs(folder: Path, columns: dict[str, list[str]]) -> Rows:
    """The rows of a folder of NAME.dialogue.txt and NAME.note.txt, in its folders too.

    NAME is the id, with the folders below `folder` before it.
    """
    names: set[str] = set()
    for kind in ("dialogue", "note"):
        suffix = f".{kind}.txt"
        paths = (p for p in folder.rglob(f"*{suffix}") if not p.name.startswith("._"))  # of macOS
        found = (path.relative_to(folder).as_posix() for path in paths)
        names |= {name.removesuffix(suffix) for name in found}
    for number, name in enumerate(sorted(names), 1):
        row: dict = {columns["id"][0]: name}
        try:
            for kind in ("dialogue", "note"):
                path = folder / f"{name}.{kind}.txt"
                if not path.is_file():  # a pipe would be read for ever
                    raise FileNotFoundError
                row[columns[kind][0]] = decode_text(path.read_bytes())
            yield number, row
        except OSError:
            yield (
                number,
                BadRow(f"{path.name} is missing or unreadable: add it, or remove its partner"),
            )
        except UnicodeDecodeError:
            yield number, BadRow(f"{path.name} is not UTF-8: save it as UTF-8")
