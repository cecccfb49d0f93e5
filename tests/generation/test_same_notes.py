"""The same settings give the same notes in mid-run, by `evaluate` and by `generate`."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, run_ok

from loop.commands import generate
from loop.config.cli import load_config
from loop.data.soap import SOAP, parse_note
from loop.monitor.run_logger import as_markdown

SETTINGS = {
    "max_new_tokens": 40,
    "temperature": 1.2,
    "top_p": 0.95,
    "min_p": 0.01,
    "seed": 3,
    "candidates": 1,
    "no_repeat_ngram": 3,
    "end_loops": True,
    "forced_headings": True,
}
KEY = "valid-0"  # the first one, which evaluate --notes 1 takes: in a batch of its own everywhere


@pytest.fixture(scope="module")
def run(tiny_base, rows, tmp_path_factory) -> Path:
    """The folder of a short run whose notes are steered in all ways, on two ranks."""
    folder = tmp_path_factory.mktemp("steered")
    config = {
        "base": tiny_base,
        "data": {"train": rows["train"], "valid": rows["valid"]},
        "max_seq_len": 512,
        "batch_size": 4,
        "lr": 1e-2,
        "max_steps": 2,
        "run": {"dir": str(folder), "name": "run", "export_check_examples": 0},
        "monitor": {"eval_steps": 2, "sample_notes": [KEY]},
        "generation": SETTINGS,
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    run_ok(2, "-m", "loop.train", "--config", str(folder / "config.yaml"))
    return folder / "run"


def note_of_evaluate(run: Path, tmp_path: Path, *args: str) -> str:
    """The note that the page of `evaluate` shows."""
    page = tmp_path / "page.html"
    command = ["-m", "loop.commands.evaluate", "--config", str(run / "config.yaml")]
    run_ok(2, *command, "--split", "valid", "--notes", "1", "--html", str(page), *args)
    of_note = r'<h3>note <a [^>]*>rate</a></h3><p class="text">(.*?)</p>'
    (shown,) = re.findall(of_note, page.read_text("utf-8"), re.S)
    return html.unescape(re.sub(r"<[^>]*>", "", shown))


def row_of_generate(run: Path, tmp_path: Path, *args: str) -> dict:
    """The line that `generate` writes with the adapter's own settings, changed by `args`."""
    config = load_config(["--config", str(run / "config.yaml")])
    data = [json.loads(line) for line in open(str(config.data.valid))]
    dialogues, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    (dialogue,) = (row["dialogue"] for row in data if row["id"] == KEY)
    dialogues.write_text(json.dumps({"id": KEY, "dialogue": dialogue}) + "\n")
    out.unlink(missing_ok=True)
    files = ["--input", str(dialogues), "--output", str(out)]
    generate.main(["--adapter", str(run / "adapter"), *files, *args])
    return json.loads(out.read_text())


def same_line_breaks(text: str) -> str:
    """The text as a file in text mode gives it back."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def test_the_same_settings_give_the_same_notes_everywhere(run, tmp_path):
    row = row_of_generate(run, tmp_path)
    note = same_line_breaks(row["note"])
    assert list(parse_note(note)) == list(SOAP.headings)
    assert (
        (run / "samples" / "step-000002.md")
        .read_text("utf-8")
        .endswith(same_line_breaks(as_markdown({KEY: note})))
    )
    assert note_of_evaluate(run, tmp_path) == note
    report = json.loads((run / "report.json").read_text())["evaluate/valid"]
    trained = json.loads((run / "adapter" / "trained.json").read_text())
    assert report["generation"] == trained["generation"] == SETTINGS
    assert SETTINGS.items() <= row["by"].items()


@pytest.mark.slow
def test_another_seed_is_another_note_and_greedy_is_another_too(run, tmp_path):
    """In generate and evaluate alike; the command line changes single settings."""
    drawn = [
        row_of_generate(run, tmp_path, *args)
        for args in ([], ["--seed", "4"], ["--temperature", "0", "--no-forced-headings"])
    ]
    assert len({row["note"] for row in drawn}) == 3
    assert drawn[1]["by"] == {**drawn[0]["by"], "seed": 4}
    assert drawn[2]["by"] == drawn[0]["by"] | {
        "temperature": 0.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
        "forced_headings": False,
    }
    note = note_of_evaluate(run, tmp_path, "generation.seed=4")
    assert note == same_line_breaks(drawn[1]["note"])


def test_a_broken_section_of_trained_json_is_named(run, tmp_path, capsys):
    adapter = shutil.copytree(run / "adapter", tmp_path / "run" / "adapter")
    shutil.copy(run / "config.yaml", tmp_path / "run")
    trained = json.loads((adapter / "trained.json").read_text())
    for value, words in (
        ({"seed": -1}, "trained.json: generation: seed: Input should be greater"),
        ({"beams": 2}, "trained.json: generation: beams: Extra inputs"),
        (["x"], "trained.json: generation=\"['x']\" can't be used"),
    ):
        (adapter / "trained.json").write_text(json.dumps(trained | {"generation": value}))
        with pytest.raises(SystemExit) as end:
            row_of_generate(tmp_path / "run", tmp_path)
        err = capsys.readouterr().err
        assert end.value.code == 2 and words in err and err.count("\n") == 1


EVALUATE = """
import sys
import loop.generation.sharded as sharded
from loop.commands.evaluate import main

batch_by_length = sharded.batch_by_length
sharded.batch_by_length = lambda requests, rows: batch_by_length(requests, 2)
sharded.fits_unsharded = lambda *_: sys.argv[1] == "gathered"
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_ranks_in_lockstep_write_the_same_steered_notes(run, tmp_path):
    """Two ranks with batches of unequal length; the sections of a note end at unequal places.

    In fp32: gathered weights write by the engine, lockstep by generate, which rounds otherwise.
    """
    fp32 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
    (tmp_path / "fp32.json").write_text(json.dumps(fp32))
    command = ["--config", str(run / "config.yaml"), "--split", "valid", "--notes", "3"]
    command += [f"deepspeed={tmp_path / 'fp32.json'}", "generation.candidates=2"]
    written = []
    for way in ("gathered", "lockstep"):
        shutil.rmtree(run / "evaluate", ignore_errors=True)  # or the notes there are used again
        run_ok(2, "-c", EVALUATE, way, *command)
        (path,) = (run / "evaluate" / "valid").glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        written.append({row["id"]: (row["note"], row["ended"], row["looped"]) for row in rows})
    assert written[0] == written[1] and len(written[0]) == 3
    assert all(list(parse_note(note)) == list(SOAP.headings) for note, _, _ in written[0].values())
