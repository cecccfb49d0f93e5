"""`READERS` is the seam for a format: one generator and one entry, and its examples are read."""

import json

import pytest
from helpers import ROOT

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples
from loop.data.sources.readers import READERS, BadRow
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
