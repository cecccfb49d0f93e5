"""JSONL files of dialogues and of notes.

They are read with every mistake named by file and row. An output file is written so that a run that
was killed can be resumed with the same command.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Set
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from ..config.schema import COLUMNS, ConfigError, DataConfig
from ..data.conversations import Question
from ..data.conversations import read_questions as read_questions_of
from ..data.sources.cells import check_id
from ..data.sources.readers import BadRow, read_json
from ..distributed.files import write_atomically
from ..distributed.world import Ranks
from .decode import Note

# What helps against a file that holds other notes, by the option that named it.
REMEDIES = {"--output": "name another file, or remove this one"}


def read_by_id(path: str, option: str, allow_torn: bool = False) -> dict[str, tuple[str, dict]]:
    """{id: (option, file and row; the object)} of a JSONL file.

    A row without `id` has its number as its id. Raises ConfigError naming file and row.

    Args:
        path: of the file.
        option: of the command line, which named the file.
        allow_torn: skip the last line where it has no line break and `NotesFile` was writing it.
    """
    found: dict[str, tuple[str, dict]] = {}
    row_numbers: dict[str, int] = {}
    try:
        rows = list(read_json(Path(path)))
        if allow_torn and rows and _is_torn(path, rows[-1][1]):
            rows.pop()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or type(error).__name__}") from error
    for number, row in rows:
        where = f"{option} {path}, row {number}"
        if isinstance(row, BadRow):
            raise ConfigError(f"{where}: {row}")
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: is not an object: write {{...}}")
        try:
            key = check_id(number if row.get("id") is None else row["id"])
        except BadRow as problem:
            raise ConfigError(f"{where}: {problem}") from problem
        if key in found:
            raise ConfigError(
                f"{where} (id {key}): this id occurs twice, first in row {row_numbers[key]}: "
                "make ids unique"
            )
        found[key] = (where, row)
        row_numbers[key] = number
    return found


def _is_torn(path: str, last_row: Any) -> bool:
    """Whether `NotesFile` was killed while it wrote the last row of the file."""
    if Path(path).read_bytes().endswith(b"\n"):
        return False
    return isinstance(last_row, BadRow) or (isinstance(last_row, dict) and "by" in last_row)


def read_questions(
    source: str, columns: dict | None = None, names: Set[str] = frozenset()
) -> dict[str, Question]:
    """Dialogues by id, of any source of data.test, with the ids that evaluate gives its rows.

    Raises ConfigError naming the row, never its text.

    Args:
        source: named as in data.test.
        columns: as data.columns.
        names: of the columns to fill the request's {NAME}s from.
    """
    columns = columns or {"id": "id", "dialogue": "dialogue"}
    if "dialogue" not in columns:
        raise ConfigError("data.columns: generate reads dialogues; map dialogue")
    if unknown := sorted(map(str, {*columns} - names - {*COLUMNS})):
        raise ConfigError(f"data.columns.{unknown[0]}: there is no such column to read")
    try:
        data = DataConfig(train=source, test=source, columns={"note": "soap"} | columns)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        raise ConfigError(f"data.columns: {mistake['msg']}") from error
    try:
        return read_questions_of(data, "test", names)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"data.test={source}", f"--input {source}")) from error


def read_predictions(path: str, ids: list[str], option: str = "--predictions") -> dict[str, Note]:
    """Notes by id, of a JSONL file with `id` and `note`, at least one for each of `ids`.

    Raises ConfigError naming the row or the first id without a note.
    """
    found = {}
    for key, (where, row) in read_by_id(path, option).items():
        if not isinstance(row.get("note"), str):
            raise ConfigError(
                f"{where}: has no text `note`: "
                "write one, an empty one where the model wrote nothing"
            )
        found[key] = Note(row["note"], row.get("ended"), row.get("looped") is True)
    missing = [key for key in ids if key not in found]
    if missing:
        raise ConfigError(
            f"{option} {path}: {len(missing)} of {len(ids)} examples have no note, "
            f"first id {missing[0]}: add them, or score the first N with --notes N"
        )
    return found


def _open_and_lock(path: str, option: str) -> BinaryIO:
    """The file, created where it is missing. Raises ConfigError where another run has it open."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ConfigError(f"{option} {path}: is no file that keeps what is written; name another")
    try:
        # Notes are a patient's: only the file's owner may read them.
        Path(path).touch(mode=0o600)
        Path(path).chmod(0o600)
        file = Path(path).open("r+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{option} {path}: another run writes to it; wait for its end, or name another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from error
    return file


class NotesFile:
    """An output file of notes, one a line.

    Each line also tells what wrote the note, so that the notes of two adapters are never mixed.
    `done` are the rows that the file holds, by id.
    """

    def __init__(
        self, path: str, dialogues: dict[str, str], by: dict, option: str = "--output"
    ) -> None:
        """Opens and locks the file: a new one, or one that an earlier run left unfinished.

        A torn last line, which that run was writing when it was killed, is cut off. Raises
        ConfigError when the file is in use, or holds anything but notes on `dialogues` by `by`.

        Args:
            path: of the file.
            dialogues: texts by id.
            by: what writes the notes: every setting that changes them.
            option: of the command line, which named the file; for messages.
        """
        self.path = Path(path)
        self.dialogues = dialogues
        self.by = by
        self.option = option
        self.file = _open_and_lock(path, option)
        try:
            content = self.file.read()
            self.done = self.read(path)
            if content and not self.done and not content.startswith(b'{"id": "'):
                raise ConfigError(
                    f"{option} {path}: was not written by this command; {self.remedy}"
                )
        except ConfigError:
            self.file.close()
            raise
        self.file.seek(content.rfind(b"\n") + 1)
        self.file.truncate()

    @property
    def remedy(self) -> str:
        return REMEDIES.get(self.option, "remove this file")

    def read(self, path: str) -> dict[str, dict]:
        """The rows of a file of such notes by id, this one or another, without a torn last line.

        Raises ConfigError for a row that this run would not have written.
        """
        rows = read_by_id(path, self.option, allow_torn=True)
        for key, (where, row) in rows.items():
            self._refuse_foreign(where, key, row)
        return {key: row for key, (_, row) in rows.items()}

    def _refuse_foreign(self, where: str, key: str, row: dict) -> None:
        """Raises ConfigError for a row that this run would not have written."""
        remedy = self.remedy
        if not isinstance(row.get("by"), dict) or "note" not in row:
            raise ConfigError(f"{where}: was not written by this command; {remedy}")
        theirs = row["by"]
        if theirs != self.by:
            name = next(n for n in {**self.by, **theirs} if self.by.get(n) != theirs.get(n))
            raise ConfigError(
                f"{where}: written with {name} {theirs.get(name)}, now {self.by.get(name)}; "
                f"{remedy}"
            )
        if key not in self.dialogues or row.get("dialogue") != digest(self.dialogues[key]):
            raise ConfigError(f"{where} (id {key}): its dialogue is not the input's; {remedy}")

    def add(self, key: str, note: Note, turns_left_out: int | None = None) -> None:
        """Appends the note on the dialogue `key`; the line is complete when this returns.

        turns_left_out: of the dialogue; None: not counted.
        """
        row = {
            "id": key,
            "note": note.text,
            "ended": note.ended,
            "looped": note.looped,
            "turns_left_out": turns_left_out,
            "dialogue": digest(self.dialogues[key]),
            "by": self.by,
        }
        self.done[key] = row
        self.file.write((json.dumps(row) + "\n").encode())
        self.file.flush()

    def close(self) -> None:
        """Closes the file. A complete one gets its notes in the order of the dialogues.

        They were written in the order of the dialogues' lengths.
        """
        if all(key in self.done for key in self.dialogues):
            self.write_in_order(self.path, self.done)
        self.file.close()

    def write_in_order(self, path: Path, rows: dict[str, dict]) -> None:
        """Writes the row of each dialogue to a file that is complete or absent."""
        lines = [json.dumps(rows[key]) + "\n" for key in self.dialogues]
        write_atomically(path, "".join(lines))


class KeptNotes:
    """The notes of an evaluation, in a file as soon as they are written.

    Each rank appends to a file of its own beside `path`, so nothing is exchanged, and whenever a
    rank is killed only its present batch is lost. The next evaluation by the same settings finds
    the notes of all of these files, on any number of ranks. `finish` makes them one file.
    `found` are the notes that were there, by id, equal on every rank.
    """

    def __init__(self, path: Path, dialogues: dict[str, str], by: dict, ranks: Ranks) -> None:
        """Opens this rank's file and reads all. Every rank must call it.

        Raises ConfigError on all of them where a file is in use or holds other notes.

        Args:
            path: of the one file at the end.
            dialogues: as in `NotesFile`.
            by: as in `NotesFile`.
            ranks: those that write.
        """
        self.path = path
        self.ranks = ranks
        self.file: NotesFile | None = None
        problem: str | None = None
        rows: dict[str, dict] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_suffix(f".rank-{ranks.rank}.jsonl")
            self.file = NotesFile(str(own), dialogues, by, "notes of an evaluation,")
            for other in self._files():
                rows |= self.file.read(str(other))
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path.parent}: cannot be made ({error.strerror}): make it writable"
        # Ranks without a common disk read different files.
        gathered = ranks.all_gather_json([problem, rows])
        problem = next((problem for problem, _ in gathered if problem), None)
        if problem:
            self.close()
            raise ConfigError(problem)
        self.rows: dict[str, dict] = {}
        for _, rows in gathered:
            self.rows |= rows
        self.found = {
            key: Note(row["note"], row["ended"], row["looped"]) for key, row in self.rows.items()
        }

    def _files(self) -> list[Path]:
        """The one file and those of ranks, of this evaluation and of earlier ones."""
        return sorted(self.path.parent.glob(f"{self.path.stem}*.jsonl"))

    def add(self, notes: dict[str, Note]) -> None:
        """Appends those of the notes that were not there; their lines are complete then."""
        assert self.file is not None
        for key, note in notes.items():
            if key not in self.found:
                self.file.add(key, note)

    def finish(self) -> None:
        """Puts the notes of all ranks into the one file. Every rank must call it, after the last.

        Killed meanwhile, either the one file or those of the ranks have them.
        """
        assert self.file is not None
        for rows in self.ranks.all_gather_json(self.file.done):
            self.rows |= rows
        if self.ranks.is_main:
            self.file.write_in_order(self.path, self.rows)
        self.ranks.any(False)  # rank 0 has written it
        for path in self._files():
            if path != self.path:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes this rank's file; without a note it is removed."""
        if self.file is None:
            return
        if not self.file.done:
            self.file.path.unlink(missing_ok=True)
        self.file.file.close()


def digest(data: str | bytes) -> str:
    """The first 16 hex digits of the SHA-256 of a text or of bytes."""
    if isinstance(data, str):
        data = data.encode(errors="surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]
