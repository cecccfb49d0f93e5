"""A task that is not the SOAP note, through every command; what has ranks runs on two."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import run_ok

from loop.commands import generate, merge
from loop.config.cli import load_config
from loop.data.soap import parse_note
from loop.export.compare import ADAPTER, WAYS
from loop.generation.prompt import prompt_texts

pytestmark = pytest.mark.slow

TASK = {
    "system": "",
    "request": "Schreibe den Bericht für {station}.",
    "headings": {"Befund": ["BEFUND", "Status"], "Plan": "Procedere"},
}
ROW = {"dialogue": "Arzt: Schmerzen? {}\nPatient: Ja.", "soap": "Befund: {}\nPlan: Ruhe"}
SECTIONS = ["Befund", "Plan"]


def filled(number: int) -> dict:
    texts = {key: text.replace("{}", str(number)) for key, text in ROW.items()}
    return {"id": f"v{number}", "Station": f"Chirurgie {number % 3}", **texts}


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    """The folder of a finished run, which chose its best validation by the task's headings."""
    folder = tmp_path_factory.mktemp("task")
    for split, numbers in (("train", range(30)), ("valid", range(30, 34))):
        lines = [json.dumps(filled(number)) + "\n" for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    columns = {"dialogue": "dialogue", "note": "soap", "station": "Station"}
    sources = {split: f"{folder}/{split}.jsonl" for split in ("train", "valid")}
    config = {
        "base": tiny_base,
        "task": TASK,
        "data": {**sources, "columns": columns, "headings": "required"},
        "max_seq_len": 512,
        "batch_size": 4,
        "max_steps": 3,
        "run": {"dir": str(folder), "name": "run", "save_steps": 3},
        "monitor": {"eval_steps": 3, "best": "sections", "best_notes": 2},
        "generation": {"max_new_tokens": 12, "forced_headings": True},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    run_ok(2, "-m", "loop.train", "--config", str(file), seconds=600)
    return folder / "run"


@pytest.fixture
def config(run):
    return load_config(["--config", str(run / "config.yaml")])


def test_what_leaves_the_run_says_what_it_was_asked(run, config):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    figures = [line for line in lines if "eval/sections" in line][-1]
    assert {"eval/section/Befund", "eval/section/Plan", "eval/Plan/rouge1"} <= figures.keys()
    assert not any("/S" in name or "/O/" in name for name in figures)
    trained = json.loads((run / "adapter" / "trained.json").read_text())
    texts = prompt_texts(config.task)
    assert {key: trained["prompt"][key] for key in texts} == texts
    card = (run / "adapter" / "README.md").read_text()
    assert "# Clinical notes: an adapter" in card and "SOAP" not in card
    assert "It writes a note (Befund, Plan)" in card and "language" not in card.split("---")[1]
    assert 'REQUEST.replace("{station}", station)' in card
    assert "def write_note(conversation, station):" in card
    assert "There is no system message." in card
    assert '"role": "system"' not in card and "The prompt is English" not in card


def test_evaluate_and_generate_ask_what_each_row_says(run, config, tmp_path, capsys):
    page, notes = tmp_path / "page.html", tmp_path / "notes.jsonl"
    words = ["--split", "valid", "--html", str(page)]
    file = str(run / "config.yaml")
    out = run_ok(2, "-m", "loop.commands.evaluate", "--config", file, *words, seconds=600)
    assert "Befund, Plan, in order" in out and "S, O, A, P" not in out
    report = json.loads((run / "report.json").read_text())["evaluate/valid"]
    assert report["figures"]["sections"]["reference"] == 1 and "Befund" in page.read_text()
    adapter = ["--adapter", str(run / "adapter")]
    wanted = "data.columns={dialogue: dialogue, station: Station}"
    generate.main([*adapter, "--input", config.data.valid, "--output", str(notes), wanted])
    written = {row["id"]: row["note"] for row in map(json.loads, notes.open())}
    kept = next((run / "evaluate" / "valid").glob("notes-*.jsonl"))
    evaluated = {row["id"]: row["note"] for row in map(json.loads, kept.open())}
    assert written.keys() == evaluated.keys() == {f"v{number}" for number in range(30, 34)}
    for note in (*written.values(), *evaluated.values()):
        assert [*parse_note(note, config.task)] == SECTIONS
    (tmp_path / "d.txt").write_text(filled(30)["dialogue"])
    capsys.readouterr()
    generate.main([*adapter, "--dialogue", f"{tmp_path}/d.txt", "--field", "station=Chirurgie 0"])
    assert [*parse_note(capsys.readouterr().out, config.task)] == SECTIONS


def test_merged_models_know_it(run, config, tmp_path, capsys):
    merged = tmp_path / "merged"
    words = ["--out", str(merged), "--report", str(run / "config.yaml"), "--notes", "2"]
    merge.main(["--adapter", str(run / "adapter"), *words])
    ways = json.loads((merged / "report.json").read_text())["ways"]
    assert ways.keys() == {ADAPTER, *WAYS} and ways[ADAPTER]["same"] == 2
    modelfile = (merged / "nf4" / "Modelfile").read_text()
    assert 'after: "Schreibe den Bericht für {station}.' in modelfile
    assert "SYSTEM" not in modelfile and "Schreibe" not in modelfile.split("TEMPLATE")[1]
    (tmp_path / "d.txt").write_text(filled(30)["dialogue"])
    capsys.readouterr()
    field = ["--field", "station=Chirurgie 0"]
    generate.main(["--base", f"{merged}/nf4", "--dialogue", f"{tmp_path}/d.txt", *field])
    assert [*parse_note(capsys.readouterr().out, config.task)] == SECTIONS


def test_the_canaries_rows_ask_what_the_rows_asked(run):
    planted = ["--canaries", "1", "--repeats", "1", "data.identifiers=error"]
    file = str(run / "config.yaml")
    out = run_ok(2, "-m", "loop.commands.evaluate", "--config", file, *planted, seconds=600)
    assert "exposure of made-up record numbers" in out
    data = run.parent / "run-canaries-data" / "train.jsonl"
    assert {json.loads(line)["station"] for line in data.open()} == {
        f"Chirurgie {n}" for n in range(3)
    }
