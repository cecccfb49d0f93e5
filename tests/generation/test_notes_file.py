"""Files of notes: what a kill leaves behind, and two who write to one."""

import json
import stat
from pathlib import Path

import pytest

from loop.config.schema import ConfigError
from loop.generation.decode import Note
from loop.generation.notes_file import KeptNotes, NotesFile, read_predictions, read_questions

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


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_what_keeps_nothing_is_no_output(path):
    """/dev/full would be read without an end."""
    with pytest.raises(ConfigError, match=f"^--output {path}: is no file that keeps"):
        NotesFile(path, DIALOGUES, BY)


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
        ("x", "row 1: is not an object"),
        ({"id": ["a"], "note": "x"}, "row 1: "),
    ],
)
def test_predictions_that_lack_something_are_named(tmp_path, row, words):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=words):
        read_predictions(str(tmp_path / "p.jsonl"), ["a"])


def test_predictions_with_an_id_twice_are_no_choice(tmp_path):
    row = json.dumps({"id": "a", "note": "x"})
    (tmp_path / "p.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(ConfigError, match=r"row 2 \(id a\): this id occurs twice, first in row 1"):
        read_predictions(str(tmp_path / "p.jsonl"), ["a"])


def test_predictions_are_read_with_their_end(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"id": 7, "note": "", "ended": false}\n{"id": "b", "note": "S: x"}'
    )
    assert read_predictions(str(tmp_path / "p.jsonl"), ["7", "b"]) == {
        "7": Note("", False),
        "b": Note("S: x", None),
    }


class OneRank:
    """Ranks of one process."""

    rank = 0
    is_main = True

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def all_gather_json(self, value) -> list:
        return [json.loads(json.dumps(value))]

    def any(self, flag: bool) -> bool:
        return flag


def test_kept_notes_of_any_ranks_are_found_and_become_one_file(tmp_path):
    """Also those of a file whose last line is torn; a note that was there is not written again."""
    path = tmp_path / "evaluate" / "notes-1.jsonl"
    for rank, key in ((0, "2"), (3, "1")):
        kept = KeptNotes(path, DIALOGUES, BY, OneRank(rank))
        kept.add({key: Note(f"S: {key}", rank == 0, rank == 3)})
        kept.close()
    torn = path.with_suffix(".rank-3.jsonl")
    torn.write_bytes(torn.read_bytes() + b'{"id": "3", "no')
    assert stat.S_IMODE(torn.stat().st_mode) == 0o600
    kept = KeptNotes(path, DIALOGUES, BY, OneRank())
    assert kept.found == {"1": Note("S: 1", False, True), "2": Note("S: 2", True, False)}
    kept.add({"2": Note("S: other", True), "3": Note("S: 3 \ud83d", True)})
    kept.finish()
    kept.close()
    assert list(path.parent.iterdir()) == [path]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "2", "3"]
    kept = KeptNotes(path, DIALOGUES, BY, OneRank())
    assert kept.found["2"].text == "S: 2" and kept.found["3"].text == "S: 3 \ud83d"
    kept.close()
    assert list(path.parent.iterdir()) == [path]


def test_kept_notes_of_other_settings_or_of_a_running_evaluation_are_refused(tmp_path):
    path = tmp_path / "notes-1.jsonl"
    kept = KeptNotes(path, DIALOGUES, BY, OneRank())
    with pytest.raises(ConfigError, match="another run writes to it"):
        KeptNotes(path, DIALOGUES, BY, OneRank())
    kept.add({"1": Note("S: 1", True)})
    kept.close()
    with pytest.raises(ConfigError, match="row 1: written with adapter x, now y; remove this file"):
        KeptNotes(path, DIALOGUES, {"adapter": "y"}, OneRank(1))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        KeptNotes(tmp_path / "file" / "notes-1.jsonl", DIALOGUES, BY, OneRank())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"id": "a", "dialogue": "b \ud83d"},
            r"row 1 \(id a\): dialogue is not UTF-8, or holds half a surrogate pair",
        ),
        ({"id": "\ud83d", "dialogue": "b"}, "row 1: its id is not UTF-8, or holds half a"),
    ],
)
def test_half_a_surrogate_pair_is_refused_where_a_tokenizer_would_fail(tmp_path, row, words):
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=words):
        read_questions(str(tmp_path / "d.jsonl"))


def test_predictions_may_hold_anything(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "note": "x \ud83d\x00"}))
    assert read_predictions(str(tmp_path / "p.jsonl"), ["a"])["a"].text == "x \ud83d\x00"


def test_a_note_on_another_text_of_the_same_id_is_refused(tmp_path):
    """As where a row of the input was corrected meanwhile."""
    path, by = str(tmp_path / "notes.jsonl"), {"adapter": "1"}
    file = NotesFile(path, {"a": "Patient: x"}, by)
    file.add("a", Note("S: x", True))
    file.close()
    NotesFile(path, {"a": "Patient: x"}, by).file.close()
    with pytest.raises(ConfigError, match=r"row 1 \(id a\): its dialogue is not the input's"):
        NotesFile(path, {"a": "Patient: y"}, by)
