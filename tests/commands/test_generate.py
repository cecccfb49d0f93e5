"""The command that writes notes from dialogues."""

import io
import json
import os
import signal
import subprocess

import pytest
from helpers import CPU, PYTHON, ROOT

from loop.commands import generate
from loop.config.schema import ConfigError, GenerationSettings, TaskConfig
from loop.export.audit import WEIGHTS
from loop.generation.decode import Note
from loop.generation.loading import fit_dialogues, prompt_ids
from loop.generation.notes_file import digest
from loop.model.loading import load_tokenizer

ROWS = [
    {"id": "b", "dialogue": "Doctor: 1?\nPatient: pain 2 and more of it"},
    {"id": "a", "dialogue": "Patient: x"},
    {"dialogue": "Doctor: hello?"},
]


def command(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [PYTHON, "-m", "loop.commands.generate", *args],
        cwd=ROOT,
        env=os.environ | CPU,
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def files(trained, tmp_path):
    """(the arguments for a file of three dialogues, its output)."""
    path = tmp_path / "in.jsonl"
    out = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    args = ["--adapter", str(trained / "adapter"), "--input", str(path), "--output", str(out)]
    handler = signal.getsignal(signal.SIGTERM)
    yield [*args, "--max-new-tokens", "6"], out
    signal.signal(signal.SIGTERM, handler)


def refused(capsys, *args: str) -> str:
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as end:
        generate.main(list(args))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_command_reads_a_file_or_standard_input(trained, tmp_path, capsys, files):
    dialogue = "Doctor: 5?\nPatient: pain"
    (tmp_path / "d.txt").write_text(dialogue)
    args = ["--adapter", str(trained / "adapter"), "--max-new-tokens", "8"]
    generate.main([*args, "--dialogue", str(tmp_path / "d.txt")])
    piped = command(*args, stdin=dialogue)
    assert piped.returncode == 0 and piped.stdout.strip(), piped.stderr
    assert piped.stdout == capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["--adapter", "nowhere", "--dialogue", "-"], "Doctor: hi", "--adapter nowhere"),
        (["--dialogue", "nowhere.txt"], "", "nowhere.txt: No such file"),
        ([], "Doctor: hi", "--adapter DIR or --base"),
        (["--adapter", "x"], "  \n", "the dialogue is empty"),
        (["--adapter", "x"], "\u200b\u2060\n", "the dialogue is empty"),
    ],
)
def test_wrong_arguments_end_with_2(monkeypatch, capsys, args, stdin, words):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    assert words in refused(capsys, *args)


def test_an_interrupted_file_is_resumed(files, monkeypatch, capsys):
    """Ctrl-C after a batch, then a line torn by a kill.

    The same command makes the file that an uninterrupted one makes, and writes no note twice.
    """
    args, out = files
    generate.main(args)
    assert capsys.readouterr().out == f"3 notes in {out}, 3 of them cut off at --max-new-tokens\n"
    complete = out.read_bytes()
    rows = [json.loads(line) for line in complete.splitlines()]
    assert [row["id"] for row in rows] == ["b", "a", "test-2"]
    assert all(row["ended"] in (True, False) and row["turns_left_out"] == 0 for row in rows)
    out.unlink()
    write = generate.write_batch
    batches = []

    def recorded(model, tokenizer, keys, *rest):
        batches.append(keys)
        return write(model, tokenizer, keys, *rest)

    def interrupted(*args):
        if batches:
            raise KeyboardInterrupt
        return recorded(*args)

    monkeypatch.setattr(generate, "write_batch", interrupted)
    with pytest.raises(SystemExit) as end:
        generate.main([*args, "--batch-size", "2"])
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert len(out.read_bytes().splitlines()) == 2
    out.write_bytes(out.read_bytes()[:-20])
    monkeypatch.setattr(generate, "write_batch", recorded)
    generate.main(args)
    assert out.read_bytes() == complete and batches == [["a", "test-2"], ["test-2", "b"]]
    # Nothing is left to write, so no model is loaded.
    monkeypatch.setattr(
        generate, "load_for_generation", lambda *_: pytest.fail("a model was loaded")
    )
    generate.main(args)
    assert out.read_bytes() == complete and "pain" not in "".join(capsys.readouterr())


def test_a_note_that_ran_in_circles_is_said_and_marked(trained, files, monkeypatch, capsys):
    """Not counted as cut off at its longest; a note that went on behind its loop is counted."""
    args, out = files
    notes = {"a": Note("x", False, True), "b": Note("y", True, True), "test-2": Note("z", False)}
    monkeypatch.setattr(
        generate,
        "write_best_notes",
        lambda m, t, requests, s, task: [notes[r.key] for r in requests],
    )
    generate.main(args)
    assert capsys.readouterr().out == (
        f"3 notes in {out}, 1 of them cut off at --max-new-tokens, "
        "2 of them cut off for running in circles\n"
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"]: (row["ended"], row["looped"]) for row in rows} == {
        key: note[1:] for key, note in notes.items()
    }
    notes["-"] = Note("x", False, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("Patient: x"))
    generate.main(["--adapter", str(trained / "adapter")])
    said = capsys.readouterr()
    assert said.out == "x\n" and "the note was cut off for running in circles\n" in said.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "c", "dialogue": "Patient: secret', "row 4: is not a whole JSON object"),
        ('{"id": "c"}', "row 4 (id c): no column 'dialogue'"),
        (
            '{"id": "a", "dialogue": "Patient: secret"}',
            "row 4 (id a): this id occurs twice, first in row 2",
        ),
        ("[1]", "row 4: is not an object"),
        ('{"id": "a secret", "dialogue": "Patient: x"}', "row 4: its id must be"),
        ('{"id": "c", "dialogue": " "}', "row 4 (id c): dialogue is empty"),
    ],
)
def test_a_bad_row_ends_with_2_before_a_model_is_loaded(files, monkeypatch, capsys, line, words):
    args, out = files
    with open(args[3], "a") as file:
        file.write(line + "\n")
    monkeypatch.setattr(generate, "load_tokenizer", None)
    message = refused(capsys, *args)
    assert words in message and args[3] in message and "secret" not in message
    assert not out.exists()


def test_another_adapters_notes_are_not_mixed_in(trained, files, capsys):
    args, out = files
    generate.main(args)
    before = out.read_bytes()
    capsys.readouterr()
    message = refused(capsys, *args, "--temperature", "0.5")
    assert "row 1: written with temperature 0.0, now 0.5" in message
    message = refused(capsys, *args, "--forced-headings")
    assert "row 1: written with forced_headings False, now True" in message
    # Each setting that changes notes, and the weights.
    by = json.loads(before.splitlines()[0])["by"]
    settings = set(GenerationSettings.model_fields)
    assert by.keys() == settings | {"adapter", "base", "revision"}
    assert by["adapter"] == digest((trained / "adapter" / WEIGHTS).read_bytes())
    said = json.loads((trained / "adapter" / "trained.json").read_text())
    assert (by["base"], by["revision"]) == (said["base"], None)
    for key in by:
        lines = [json.loads(line) for line in before.splitlines()]
        lines[0]["by"][key] = "else"
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert f"row 1: written with {key} else, now" in refused(capsys, *args)
    out.write_bytes(before)
    rows = open(args[3]).read()
    open(args[3], "w").write(rows.replace("Patient: x", "Patient: y"))
    assert "(id a): its dialogue is not the input's" in refused(capsys, *args)
    assert out.read_bytes() == before
    open(args[3], "w").write(rows)
    out.write_text('{"id": "a", "text": 1}\n')
    assert "row 1: was not written by this command" in refused(capsys, *args)


def test_notes_of_another_request_are_not_mixed_in(tmp_path):
    """Another text that asks for them, or another value in its place."""
    args = generate.build_parser().parse_args(["--base", "b", "--output", str(tmp_path / "out")])
    source, task = {"base": "b", "revision": None}, TaskConfig(request="Write {part}.", headings={})

    def open_output(task: TaskConfig, part: str):
        request = generate.Request(task, {"a": {"part": part}})
        return generate.open_output(args, {"a": "hi"}, source, GenerationSettings(), request)

    output = open_output(task, "PMH")
    output.add("a", Note("Asthma.", True), 0)
    output.close()
    again = open_output(task, "PMH")
    assert list(again.done) == ["a"]
    again.close()
    with pytest.raises(ConfigError, match="its dialogue is not the input's"):
        open_output(task, "HPI")
    with pytest.raises(ConfigError, match="written with prompt"):
        open_output(task.model_copy(update={"request": "Say {part}."}), "PMH")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "x.jsonl"], "--output"),
        (["--input", "nowhere.jsonl", "--output", "o.jsonl"], "nowhere.jsonl: no such file"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "0.5"], "--top-p: means something only with --temperature above 0"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--candidates", "4"], "--candidates: means something only with --temperature above 0"),
        (["--candidates", "65"], "--candidates 65"),
        (["--seed", "1", "--temperature", "0"], "--seed: means something only with --temperature"),
        (["--no-repeat-ngram", "-1"], "--no-repeat-ngram -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (
            ["--input", "x", "--output", "y", "data.columns={dialogue: 2024-13-45, &a x: *a"],
            "write '",
        ),
        (["--dialogue", "x" * 300], "--dialogue: 300 characters"),
        (["--dialogue", "/dev/zero"], "--dialogue /dev/zero: larger than"),
        (["--strict"], "--strict is --forced-headings now"),
    ],
)
def test_options_that_make_no_sense_end_with_2(trained, monkeypatch, capsys, args, words):
    monkeypatch.setattr("sys.stdin", io.StringIO("Doctor: hi"))
    monkeypatch.setattr(generate, "load_tokenizer", None)  # it is said before anything is loaded
    assert words in refused(capsys, "--adapter", str(trained / "adapter"), *args)


def test_a_dialogue_over_the_context_is_shortened_as_in_training(tiny_base, capsys):
    tokenizer = load_tokenizer(tiny_base)
    long = "\n".join(f"Doctor: question {i}?\nPatient: answer {i}." for i in range(40))
    fitted = fit_dialogues(tokenizer, {"long": long, "short": "Patient: x"}, 500, 60)
    text, turns = fitted["long"]
    assert fitted["short"] == ("Patient: x", 0)
    assert turns > 0 and f"[{turns} turns left out]" in text
    assert text.startswith("Doctor: question 0?") and text.endswith("Patient: answer 39.")
    assert len(prompt_ids(tokenizer, text)) <= 440 < len(prompt_ids(tokenizer, long))
    generate.warn_of_shortened(fitted, 500)
    assert capsys.readouterr().err == (
        "1 of 2 dialogues had turns left out of their middle to fit 500 tokens: long\n"
    )
    with pytest.raises(ConfigError, match="id one: does not fit"):
        fit_dialogues(tokenizer, {"one": "Patient: " + "x " * 900}, 500, 60)
    with pytest.raises(ConfigError, match="--max-new-tokens 500"):
        fit_dialogues(tokenizer, {}, 500, 500)
