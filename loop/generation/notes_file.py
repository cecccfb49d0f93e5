"""Files of dialogues and of notes, a JSON object a line: read with every mistake named, written so that an interrupted one can be gone on with."""

import fcntl
import hashlib
import json
import re
from pathlib import Path

from ..config.schema import ConfigError
from ..data.readers import BadRow, read_json
from ..distributed.files import write_atomically
from .decode import Note


def read_by_id(path: str, option: str, torn: bool = False) -> dict[str, tuple[str, dict]]:
    """{id: (file and row, object)} of the JSONL file that an option of a command names; a row without `id` has its number for one. torn: a
    last line of ours that lacks its line break is passed over. Raises ConfigError naming file and row."""
    found: dict[str, tuple[str, dict]] = {}
    try:
        rows = list(read_json(Path(path)))
        if (
            torn
            and rows
            and not Path(path).read_bytes().endswith(b"\n")
            and (isinstance(rows[-1][1], BadRow) or "by" in rows[-1][1])
        ):
            rows.pop()
        for number, row in rows:
            where = f"{option} {path}, row {number}"
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{where}: {row if isinstance(row, BadRow) else 'is not an object: write {...}'}"
                )
            key = str(number if row.get("id") is None else row["id"])
            if not re.fullmatch(r"\S{1,100}", key):
                raise ConfigError(
                    f"{where}: its id must be a number, or 1 to 100 characters without a space"
                )
            if key in found:
                raise ConfigError(
                    f"{where} (id {key}): this id occurs twice, first in row {found[key][0].rsplit(' ', 1)[1]}: make ids unique"
                )
            found[key] = (where, row)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or type(error).__name__}") from error
    return found


def read_dialogues(path: str) -> dict[str, str]:
    """Dialogues by id, of a JSONL file with dialogue and id. Raises ConfigError naming the row, never its text."""
    rows = read_by_id(path, "--input")
    for where, row in rows.values():
        if not isinstance(row.get("dialogue"), str) or not row["dialogue"].strip():
            raise ConfigError(f"{where}: has no text `dialogue`: fill it or remove the row")
    if not rows:
        raise ConfigError(f"--input {path}: the file is empty")
    return {key: row["dialogue"] for key, (_, row) in rows.items()}


def read_predictions(path: str, ids: list[str]) -> dict[str, Note]:
    """Notes of a JSONL file with id and note, one for each of `ids`. Raises ConfigError naming the row."""
    found = {}
    for key, (where, row) in read_by_id(path, "--predictions").items():
        if not isinstance(row.get("note"), str):
            raise ConfigError(
                f"{where}: has no text `note`: write one, an empty one where the model wrote nothing"
            )
        found[key] = Note(row["note"], row.get("ended"))
    if missing := [key for key in ids if key not in found]:
        raise ConfigError(
            f"--predictions {path}: {len(missing)} of {len(ids)} examples have no note, first id {missing[0]}: add them, or score "
            "the first N with --notes N"
        )
    return found


class NotesFile:
    """An output of notes, a line each with what wrote it, so that nobody mixes the notes of two adapters unawares."""

    def __init__(self, path: str, dialogues: dict[str, str], by: dict) -> None:
        """Opens the file, made anew or left unfinished by an earlier run; the half line at which that was killed is cut off. by: what
        writes, whatever makes a note another one. Raises ConfigError when the file holds something else."""
        self.path, self.dialogues, self.by = Path(path), dialogues, by
        try:
            self.path.touch(mode=0o600)  # notes are a patient's: its owner's alone
            self.path.chmod(0o600)
            self.file = self.path.open("r+b")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--output {path}: another run writes to it; wait for its end, or name another file"
            ) from None
        except OSError as error:
            raise ConfigError(f"--output {path}: {error.strerror}") from error
        try:
            whole = self.file.read()
            found = read_by_id(path, "--output", torn=True)
            for key, (where, row) in found.items():
                self._refuse_another(where, key, row)
            if whole and not found and not whole.startswith(b'{"id": "'):
                raise ConfigError(
                    f"--output {path}: was not written by this command; name another file, or remove this one"
                )
        except ConfigError:
            self.file.close()
            raise
        self.done = {key: row for key, (_, row) in found.items()}
        self.file.seek(whole.rfind(b"\n") + 1)
        self.file.truncate()

    def _refuse_another(self, where: str, key: str, row: dict) -> None:
        other = "name another file, or remove this one"
        if not isinstance(row.get("by"), dict) or "note" not in row:
            raise ConfigError(f"{where}: was not written by this command; {other}")
        if row["by"] != self.by:
            name = next(k for k in {**self.by, **row["by"]} if self.by.get(k) != row["by"].get(k))
            raise ConfigError(
                f"{where}: written with {name} {row['by'].get(name)}, now {self.by.get(name)}; {other}"
            )
        if key not in self.dialogues or row.get("dialogue") != digest(self.dialogues[key]):
            raise ConfigError(f"{where} (id {key}): its dialogue is not the input's; {other}")

    def add(self, key: str, note: Note, turns_left_out: int) -> None:
        """Appends a note, whole on the disk when this returns."""
        row = {
            "id": key,
            "note": note.text,
            "ended": note.ended,
            "turns_left_out": turns_left_out,
            "dialogue": digest(self.dialogues[key]),
        }
        self.done[key] = row | {"by": self.by}
        self.file.write((json.dumps(self.done[key]) + "\n").encode())
        self.file.flush()

    def close(self) -> None:
        """Puts the notes into the order of the dialogues: they were written in the order of their lengths."""
        if all(key in self.done for key in self.dialogues):
            write_atomically(
                self.path, "".join(json.dumps(self.done[key]) + "\n" for key in self.dialogues)
            )
        self.file.close()


def digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]
