"""A task that is not the SOAP note, from training to what leaves the run, on two ranks."""

import json

import pytest
import yaml
from helpers import run_ok

from loop.commands import generate, merge
from loop.config.cli import load_config
from loop.data.conversations import read_split
from loop.data.soap import parse_note
from loop.export.compare import ADAPTER, WAYS
from loop.generation.prompt import prompt_texts

TASK = {
    "system": "",
    "request": "Schreibe den Bericht für {station}.",
    "headings": {"Befund": ["BEFUND", "Status"], "Plan": "Procedere"},
}
ROW = {"dialogue": "Arzt: Schmerzen? {}\nPatient: Ja.", "soap": "Befund: {}\nPlan: Ruhe"}


def filled(number: int) -> dict:
    texts = {key: text.replace("{}", str(number)) for key, text in ROW.items()}
    return {"id": f"v{number}", "Station": f"Chirurgie {number % 3}", **texts}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """The folder of a run of this task; its data and configuration are beside it."""
    folder = tmp_path_factory.mktemp("another_task")
    for split, numbers in (("train", range(30)), ("valid", range(30, 34))):
        lines = [json.dumps(filled(number)) + "\n" for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    file = folder / "config.yaml"
    columns = {"dialogue": "dialogue", "note": "soap", "station": "Station"}
    config = {
        "base": tiny_base,
        "task": TASK,
        "data": {split: f"{folder}/{split}.jsonl" for split in ("train", "valid")}
        | {"columns": columns, "headings": "required"},
        "max_seq_len": 512,
        "batch_size": 4,
        "max_steps": 3,
        "run": {"dir": str(folder), "name": "run", "save_steps": 3},
        "monitor": {"eval_steps": 3, "best": "sections", "best_notes": 2},
        "generation": {"max_new_tokens": 12, "forced_headings": True},
    }
    file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    run_ok(2, "-m", "loop.train", "--config", str(file))
    return folder / "run"


@pytest.fixture
def task(run):
    return load_config(["--config", str(run / "config.yaml")]).task


def test_samples_are_scored_by_its_headings(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    figures = [line for line in lines if "eval/sections" in line][-1]
    assert {"eval/section/Befund", "eval/section/Plan", "eval/Plan/rouge1"} <= figures.keys()
    assert not any("/S" in name or "/O/" in name for name in figures)


def test_what_leaves_the_run_says_what_it_was_asked(run, task):
    """What leaves the run says what it was asked."""
    trained = json.loads((run / "adapter" / "trained.json").read_text())
    texts = prompt_texts(task)
    assert {key: trained["prompt"][key] for key in texts} == texts
    card = (run / "adapter" / "README.md").read_text()
    assert "# Clinical notes: an adapter" in card and "SOAP" not in card
    assert "It writes a note (Befund, Plan)" in card and "language" not in card.split("---")[1]
    assert 'REQUEST.replace("{station}", station)' in card
    assert "def write_note(conversation, station):" in card
    assert '"role": "system"' not in card and "The prompt is English" not in card


def test_evaluate_asks_what_each_row_says_on_all_ranks(run, tmp_path):
    """Evaluate: all ranks ask what each row says, and score by the task's headings."""
    page = tmp_path / "page.html"
    words = ["--split", "valid", "--html", str(page)]
    out = run_ok(2, "-m", "loop.commands.evaluate", "--config", str(run / "config.yaml"), *words)
    assert "Befund, Plan, in order" in out and "S, O, A, P" not in out
    report = json.loads((run / "report.json").read_text())["evaluate/valid"]
    assert report["figures"]["sections"]["reference"] == 1 and "Befund" in page.read_text()


def test_generate_asks_what_each_row_says(run, task, tmp_path, capsys):
    """Of all rows of a file, and of one dialogue with --field."""
    notes = tmp_path / "notes.jsonl"
    adapter = ["--adapter", str(run / "adapter")]
    wanted = "data.columns={dialogue: dialogue, station: Station}"
    generate.main(
        [*adapter, "--input", f"{run.parent}/valid.jsonl", "--output", str(notes), wanted]
    )
    written = {row["id"]: row["note"] for row in map(json.loads, notes.open())}
    kept = next((run / "evaluate" / "valid").glob("notes-*.jsonl"))
    assert written.keys() == {row["id"] for row in map(json.loads, kept.open())}
    assert all([*parse_note(note, task)] == ["Befund", "Plan"] for note in written.values())
    first = read_split(load_config(["--config", str(run / "config.yaml")]), "valid")[0][0]
    (tmp_path / "d.txt").write_text(first.dialogue)
    capsys.readouterr()
    station = f"station={first.fields['station']}"
    generate.main([*adapter, "--dialogue", f"{tmp_path}/d.txt", "--field", station])
    assert parse_note(capsys.readouterr().out, task).keys() == {"Befund", "Plan"}


def test_merged_models_know_the_task(run, task, tmp_path, capsys):
    """Merge --report measures on the run's data with the run's task; the models know it as well."""
    talk = tmp_path / "d.txt"
    talk.write_text(filled(31)["dialogue"])
    station = f"station={filled(31)['Station']}"
    adapter = ["--adapter", str(run / "adapter")]
    merged = tmp_path / "merged"
    report_on = ["--report", str(run / "config.yaml"), "--notes", "2"]
    merge.main([*adapter, "--out", str(merged), *report_on])
    ways = json.loads((merged / "report.json").read_text())["ways"]
    assert ways.keys() == {ADAPTER, *WAYS} and ways[ADAPTER]["same"] == 2
    modelfile = (merged / "nf4" / "Modelfile").read_text()
    assert 'after: "Schreibe den Bericht für {station}.' in modelfile
    assert "SYSTEM" not in modelfile and "Schreibe" not in modelfile.split("TEMPLATE")[1]
    nf4 = ["--base", str(merged / "nf4"), "--dialogue", str(talk), "--field", station]
    generate.main(nf4)
    assert parse_note(capsys.readouterr().out, task).keys() == {"Befund", "Plan"}


def test_canaries_ask_what_their_row_asked(run):
    """The canaries' run asks each planted row what the row asked."""
    planted = ["--canaries", "1", "--repeats", "1", "data.identifiers=error"]
    command = ["-m", "loop.commands.evaluate", "--config", str(run / "config.yaml"), *planted]
    assert "exposure of made-up record numbers" in run_ok(2, *command)
    rows = [json.loads(line) for line in (run.parent / "run-canaries-data" / "train.jsonl").open()]
    assert {row["station"] for row in rows} == {f"Chirurgie {n}" for n in range(3)}
