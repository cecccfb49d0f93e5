"""Notes that are written in parts: by sections, or by two writers."""

import pytest

from loop.generation.decode import Note, NoteQueue, write_with_headings
from loop.generation.engine import NoteRequest
from loop.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def written(tokenizer, plan: Note) -> tuple[Note, list[int]]:
    """(the note of such sections, how many tokens each might have); the plan may be cut off."""
    sections = {"S": " cough", "O": " clear\nA: early", "A": "", "P": plan.text}
    limits = []

    def write(requests, heading, until, done) -> list[Note]:
        limits.append(requests[0].max_new_tokens)
        return [plan if heading == "P" else Note(sections[heading], False)]

    (note,) = write_with_headings(tokenizer, [NoteRequest("a", [5], 30)], write)
    return note, limits


def test_a_section_may_have_what_those_before_it_have_left(tokenizer):
    note, limits = written(tokenizer, Note(" rest", True))
    assert note == Note("S: cough\nO: clear\nA:\nP: rest", True)
    used = [len(tokenizer(text)["input_ids"]) for text in (" cough", " clear\n")]
    assert min(used) > 0 and limits == [30, 30 - used[0], 30 - sum(used), 30 - sum(used)]


@pytest.mark.parametrize(
    ("plan", "ended"),
    [
        (Note(" rest", True), True),
        (Note(" rest\nO: b", False), True),
        (Note(" rest", False), False),
    ],
)
def test_a_note_has_ended_where_its_last_section_has(tokenizer, plan, ended):
    """By its EOS, or where the model would begin another section."""
    note, _ = written(tokenizer, plan)
    assert note.text.endswith("\nP: rest") and note.ended is ended


def test_another_writer_goes_on_with_the_notes_that_are_missing():
    """As after the engine has run out of memory: each note is that of its request."""
    said: dict[int, Note] = {}
    requests = [NoteRequest(key, [5], 9) for key in "abcd"]
    notes = NoteQueue(None, requests, None, None, said.__setitem__)
    notes.finish(1, Note("b", True))

    def write(missing, section, until, done) -> list[Note]:
        for number, request in enumerate(missing):
            done(number, Note(request.key, True))
        return [Note(request.key, True) for request in missing]

    assert notes.complete(write) == [Note(key, True) for key in "abcd"]
    assert said == {number: Note(key, True) for number, key in enumerate("abcd")}
