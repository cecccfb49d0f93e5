"""`READERS` is the seam for a format: one generator and one entry, and its examples are read."""

import gzip
import io
import json
import os
import tracemalloc
import zipfile

import pytest
from helpers import ROOT

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples
from loop.data.sources import readers
from loop.data.sources.locations import _load_dataset, open_dataset
from loop.data.sources.readers import READERS, BadRow, format_of
from loop.model.loading import load_tokenizer

ROWS = [
    {
        "id": f"r{i}",
        "dialogue": f"Doctor: How are you, {i}?\nPatient: Pain, {i}/10.",
        "soap": f"S: Pain {i}.\nO: -\nA: x\nP: y",
    }
    for i in range(4)
]


def read_visits(path):
    """Rows of a toy format: visits are separated by a line of ====, their three parts by ----."""
    for number, visit in enumerate(path.read_text().split("\n====\n"), 1):
        parts = visit.split("\n----\n")
        if len(parts) == 3:
            yield number, dict(zip(("id", "dialogue", "soap"), parts))
        else:
            yield number, BadRow("has no three parts: separate them by ----")


@pytest.fixture
def load(tiny_base, tmp_path):
    """load(path, key=value ...) -> (examples, report), with a cache of its own."""

    def load(path, *args):
        config = load_config(
            [
                "--config",
                str(ROOT / "loop" / "configs" / "soap_qlora.yaml"),
                f"base={tiny_base}",
                f"data.train={path}",
                "data.valid=null",
                "data.test=null",
                "data.valid_fraction=0",
                f"run.dir={tmp_path / 'runs'}",
                *args,
            ]
        )
        return load_examples(config, load_tokenizer(tiny_base), "train")

    return load


def test_a_reader_from_outside_gives_the_same_examples(load, tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, ".visits", read_visits)
    visits = ["\n----\n".join(row.values()) for row in ROWS]
    ours, theirs = tmp_path / "rows.visits", tmp_path / "rows.jsonl"
    ours.write_text("\n====\n".join(visits))
    theirs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    examples, report = load(ours)
    expected, expected_report = load(theirs)
    assert len(examples) == 4 and report == expected_report
    for example, other in zip(examples, expected, strict=True):
        assert example.id == other.id
        assert example.input_ids.tolist() == other.input_ids.tolist()
        assert example.labels.tolist() == other.labels.tolist()
    # Its bad rows are named and listed like those of any other format.
    ours.write_text("\n====\n".join([*visits, "no parts"]))
    with pytest.raises(ConfigError, match="rows.visits, row 5: has no three parts"):
        load(ours, "data.on_error=stop")
    examples, report = load(ours, "data.on_error=skip")
    assert len(examples) == 4 and "row 5: has no three parts" in report.skipped[0]
    # So is a file that isn't there.
    with pytest.raises(ConfigError, match="nowhere.visits: no such file"):
        load("nowhere.visits")


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "http://127.0.0.1:9/x"])
def test_a_folders_readme_names_no_file_outside_of_it(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"id": "1", "dialogue": "a", "soap": "b"}\n')
    files = f"- split: train\n    path: {name}"
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  {files}\n---\n"
    )
    with pytest.raises(ConfigError, match="outside of the folder"):
        open_dataset(str(folder), "train")


def test_a_folder_says_which_of_its_parts_is_wanted(tmp_path):
    """The library takes eval.csv for the test split, and of two kinds of files one alone."""
    for name in ("train.csv", "eval.csv"):
        (tmp_path / name).write_text("dialogue,soap\na,b\n")
    with pytest.raises(ConfigError, match="has the splits train, test: name one, SOURCE:SPLIT"):
        open_dataset(str(tmp_path), "valid")
    (tmp_path / "more.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match="a folder of .csv, .jsonl files, of which one kind"):
        open_dataset(str(tmp_path), "train")
    files = "configs:\n- config_name: a\n  data_files: more.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{files}---\n")
    assert len(open_dataset(str(tmp_path), "train")) == 1
    files += "- config_name: b\n  data_files: more.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{files}---\n")
    _load_dataset.cache_clear()
    with pytest.raises(ConfigError, match="has the subsets a, b: name one, SOURCE:SUBSET:SPLIT"):
        open_dataset(str(tmp_path), "train")


def test_a_folder_that_says_how_its_tables_are_read_is_read_so(tmp_path):
    (tmp_path / "train.csv").write_text("id#dialogue#soap\n007#a, b#c\n")
    files = "configs:\n- config_name: a\n  data_files: train.csv\n  sep: '#'\n"
    (tmp_path / "README.md").write_text(f"---\n{files}---\n")
    assert open_dataset(str(tmp_path), "train")[0]["dialogue"] == "a, b"


BOMB = b"a" * 2**24  # 16 MiB; some 16 kB when compressed
LINE = json.dumps(ROWS[0]).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl.gz", LINE + b'{"id": "' + BOMB + b'"}\n' + LINE, "row 2|16.8 MB"),
        ("rows.jsonl.gz", BOMB, "row 1|16.8 MB"),
        ("rows.json.gz", b'[{"id": "' + BOMB, "row 1|is not read, nor what follows it"),
        ("rows.csv.gz", b"id,dialogue,soap\n1,a,b\n2," + BOMB, "row 2|a line of more than 1 MB"),
        ("rows.csv.gz", b'id,soap\n1,"' + b"aaaaaaa\n" * 200_000, "row 1|field larger"),
        ("rows.parquet.gz", b"PAR1" + BOMB, "row 1|is not read, nor what follows it"),
        ("rows.xlsx", BOMB, "row 1|the workbook unpacks to"),
    ],
)
def test_a_small_file_that_unpacks_to_gigabytes_is_a_bad_row(
    tmp_path, monkeypatch, name, content, said
):
    monkeypatch.setattr(readers, "MOST_AT_ONCE", 2**23)  # 16 MiB stand for what is too much
    if name.endswith(".xlsx"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as book:
            book.writestr("xl/worksheets/sheet1.xml", content)
    path = tmp_path / name
    path.write_bytes(packed.getvalue() if name.endswith(".xlsx") else gzip.compress(content, 1))
    tracemalloc.start()
    rows = list(READERS[format_of(path)](path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = [(f"row {number}", str(row)) for number, row in rows if isinstance(row, BadRow)]
    row, text = said.split("|")
    assert len(found) == 1 and found[0][0] == row and text in found[0][1]
    assert peak < 2**25
    if content.startswith(LINE):
        assert [number for number, row in rows if isinstance(row, dict)] == [1, 3]


def test_a_pipe_among_the_pairs_is_a_bad_row(tmp_path):
    (tmp_path / "a.note.txt").write_text("S: x")
    os.mkfifo(tmp_path / "a.dialogue.txt")
    columns = {"id": ["id"], "dialogue": ["dialogue"], "note": ["soap"]}
    [(number, problem)] = readers.read_text_pairs(tmp_path, columns)
    assert number == 1 and "a.dialogue.txt is missing or unreadable" in str(problem)
