"""The command that writes notes from dialogues."""

import io
import json
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from loop.commands import generate
from loop.config.schema import ConfigError
from loop.model.loading import load_tokenizer

ROWS = [
    {"id": "b", "dialogue": "Doctor: 1?\nPatient: pain 2 and more of it"},
    {"id": "a", "dialogue": "Patient: x"},
    {"dialogue": "Doctor: hello?"},
]


def command(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "loop.generate", *args],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def files(trained, tmp_path):
    """(the arguments for a file of three dialogues, its output)."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    handler = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out.jsonl"
    yield (
        [
            "--adapter",
            str(trained / "adapter"),
            "--input",
            str(path),
            "--output",
            str(out),
            "--max-new-tokens",
            "6",
        ],
        out,
    )
    signal.signal(signal.SIGTERM, handler)


def refused(capsys, *args: str) -> str:
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as end:
        generate.main(list(args))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_command_reads_a_file_or_standard_input(trained, tmp_path, capsys, files):
    (tmp_path / "d.txt").write_text("Doctor: 5?\nPatient: pain")
    generate.main(
        [
            "--adapter",
            str(trained / "adapter"),
            "--dialogue",
            str(tmp_path / "d.txt"),
            "--max-new-tokens",
            "8",
        ]
    )
    piped = command(
        "--adapter",
        str(trained / "adapter"),
        "--max-new-tokens",
        "8",
        stdin="Doctor: 5?\nPatient: pain",
    )
    assert (
        piped.returncode == 0 and piped.stdout == capsys.readouterr().out and piped.stdout.strip()
    ), piped.stderr


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["--adapter", "nowhere", "--dialogue", "-"], "Doctor: hi", "--adapter nowhere"),
        (["--dialogue", "nowhere.txt"], "", "nowhere.txt: No such file"),
        ([], "Doctor: hi", "--adapter DIR or --base"),
        (["--adapter", "x"], "  \n", "the dialogue is empty"),
    ],
)
def test_wrong_arguments_end_with_2(monkeypatch, capsys, args, stdin, words):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    assert words in refused(capsys, *args)


def test_an_interrupted_file_is_gone_on_with(files, monkeypatch, capsys):
    """Ctrl-C after a batch, then a line torn by a kill: the same command makes the file that an unbroken one makes, and writes no note twice."""
    args, out = files
    generate.main(args)
    assert capsys.readouterr().out == f"3 notes in {out}, 3 of them cut off at --max-new-tokens\n"
    whole = out.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == ["b", "a", "3"] and all(
        row["ended"] in (True, False) and row["turns_left_out"] == 0 for row in rows
    )
    out.unlink()
    write, written = generate.write_batch, []

    def interrupted(model, tokenizer, keys, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(keys)
        return write(model, tokenizer, keys, *rest)

    monkeypatch.setattr(generate, "write_batch", interrupted)
    with pytest.raises(SystemExit) as end:
        generate.main([*args, "--batch-size", "2"])
    assert (
        end.value.code == 130
        and "the same command goes on" in capsys.readouterr().err
        and len(out.read_bytes().splitlines()) == 2
    )
    out.write_bytes(out.read_bytes()[:-20])
    monkeypatch.setattr(
        generate,
        "write_batch",
        lambda model, tokenizer, keys, *rest: (
            written.append(keys) or write(model, tokenizer, keys, *rest)
        ),
    )
    generate.main(args)
    assert out.read_bytes() == whole and written == [["a", "3"], ["3", "b"]]
    monkeypatch.setattr(
        generate, "load_for_notes", lambda *_: pytest.fail("a model was loaded")
    )  # nothing is left to write: no model is loaded
    generate.main(args)
    assert out.read_bytes() == whole and "pain" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "c", "dialogue": "Patient: secret', "row 4: is not a whole JSON object"),
        ('{"id": "c"}', "row 4: has no text `dialogue`"),
        (
            '{"id": "a", "dialogue": "Patient: secret"}',
            "row 4 (id a): this id occurs twice, first in row 2",
        ),
        ("[1]", "row 4: is not an object"),
        ('{"id": "a secret", "dialogue": "Patient: x"}', "row 4: its id must be"),
        ('{"id": "c", "dialogue": " "}', "row 4: has no text `dialogue`"),
    ],
)
def test_a_bad_row_ends_with_2_before_a_model_is_loaded(files, monkeypatch, capsys, line, words):
    args, out = files
    with open(args[3], "a") as file:
        file.write(line + "\n")
    monkeypatch.setattr(generate, "load_tokenizer", None)
    said = refused(capsys, *args)
    assert words in said and args[3] in said and "secret" not in said and not out.exists()


def test_another_adapters_notes_are_not_mixed_in(files, capsys):
    args, out = files
    generate.main(args)
    kept = out.read_bytes()
    capsys.readouterr()
    assert "row 1: written with temperature 0.0, now 0.5" in refused(
        capsys, *args, "--temperature", "0.5"
    )
    assert "row 1: written with strict False, now True" in refused(capsys, *args, "--strict")
    rows = open(args[3]).read()
    open(args[3], "w").write(rows.replace("Patient: x", "Patient: y"))
    assert "(id a): its dialogue is not the input's" in refused(capsys, *args)
    assert out.read_bytes() == kept
    open(args[3], "w").write(rows)
    out.write_text('{"id": "a", "text": 1}\n')
    assert "row 1: was not written by this command" in refused(capsys, *args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "x.jsonl"], "--output"),
        (["--input", "nowhere.jsonl", "--output", "o.jsonl"], "nowhere.jsonl: No such file"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "0.5"], "--top-p"),
        (["--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_options_that_make_no_sense_end_with_2(capsys, args, words):
    assert words in refused(capsys, "--adapter", "x", *args)


def test_a_dialogue_over_the_context_is_cut_as_in_training(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    long = "\n".join(f"Doctor: question {i}?\nPatient: answer {i}." for i in range(40))
    fitted = generate.fit_all(tokenizer, {"long": long, "short": "Patient: x"}, 500, 60)
    text, turns = fitted["long"]
    assert (
        fitted["short"] == ("Patient: x", 0) and turns > 0 and f"[{turns} turns left out]" in text
    )
    assert text.startswith("Doctor: question 0?") and text.endswith("Patient: answer 39.")
    assert (
        len(generate.prompt_ids(tokenizer, text)) <= 440 < len(generate.prompt_ids(tokenizer, long))
    )
    with pytest.raises(ConfigError, match="id one: does not fit"):
        generate.fit_all(tokenizer, {"one": "Patient: " + "x " * 900}, 500, 60)
    with pytest.raises(ConfigError, match="--max-new-tokens 500"):
        generate.fit_all(tokenizer, {}, 500, 500)
