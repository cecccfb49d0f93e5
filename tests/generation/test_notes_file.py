"""Files of notes: what a kill leaves behind, and two who write to one."""

import json
import stat
from pathlib import Path

import pytest

from loop.config.schema import ConfigError
from loop.generation.decode import Note
from loop.generation.notes_file import NotesFile, read_predictions

DIALOGUES, BY = {"1": "Doctor: a", "2": "Doctor: b", "3": "Doctor: c"}, {"adapter": "x"}


def test_any_torn_tail_is_cut_and_written_again(tmp_path):
    """Killed after any byte of the second line: the first note stays, the second is removed."""
    path = tmp_path / "out.jsonl"
    for key in DIALOGUES:
        file = NotesFile(str(path), DIALOGUES, BY)
        assert list(file.done) == list(DIALOGUES)[: int(key) - 1]
        file.add(key, Note(f"S: {key}", True), 0)
        file.close()
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)[:2]
    for size in (0, 1, len(second) // 2, len(second) - 1):
        path.write_bytes(first + second[:size])
        file = NotesFile(str(path), DIALOGUES, BY)
        assert list(file.done) == ["1"] and path.read_bytes() == first
        for key in ("3", "2"):  # in another order
            file.add(key, Note(f"S: {key}", True), 0)
        file.close()
        assert path.read_bytes() == whole
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_notes_are_never_for_others_to_read(tmp_path, monkeypatch):
    """Not in a file that was there before, nor while one is put in the place of another."""
    path, seen, replace = tmp_path / "out.jsonl", [], Path.replace
    path.touch(0o644)
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, to: seen.append(stat.S_IMODE(self.stat().st_mode)) or replace(self, to),
    )
    file = NotesFile(str(path), DIALOGUES, BY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for key in DIALOGUES:
        file.add(key, Note("S: a", True), 0)
    file.close()
    assert seen == [0o600] and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_writer_is_refused(tmp_path):
    file = NotesFile(str(tmp_path / "out.jsonl"), DIALOGUES, BY)
    with pytest.raises(ConfigError, match="another run writes to it"):
        NotesFile(str(tmp_path / "out.jsonl"), DIALOGUES, BY)
    file.close()


@pytest.mark.parametrize(
    "text", [' {"id": "1", "text": "x"}', "Dear diary", '{"id": "1", "text": "x"}\n{"id": "2", "te']
)
def test_a_file_of_somebody_elses_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="was not written by this command"):
        NotesFile(str(path), DIALOGUES, BY)
    assert path.read_text() == text


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "1", "no\n{"id": "2"}\n')
    with pytest.raises(ConfigError, match="row 1: is not a whole JSON object"):
        NotesFile(str(path), DIALOGUES, BY)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "a"}, "row 1: has no text `note`"),
        ({"id": "b", "note": "x"}, "1 of 1 examples have no note, first id a"),
    ],
)
def test_predictions_that_lack_something_are_named(tmp_path, row, words):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=words):
        read_predictions(str(tmp_path / "p.jsonl"), ["a"])


def test_predictions_are_read_with_their_end(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"id": 7, "note": "", "ended": false}\n{"id": "b", "note": "S: x"}'
    )
    assert read_predictions(str(tmp_path / "p.jsonl"), ["7", "b"]) == {
        "7": Note("", False),
        "b": Note("S: x", None),
    }
