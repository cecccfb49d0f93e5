"""Identifiers of patients in training data: found by kind, told by id, never quoted."""

import json
import time

import pytest
from helpers import ROOT

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples
from loop.data.identifiers import IDENTIFIERS, find_identifiers
from loop.model.loading import load_tokenizer

FOUND = {
    "phone number": "555-123-4567|(555) 123-4567|+1 555.123.4567|+44 20 7946 0958"
    "|my cell is 555-0142|five five five oh one four two",
    "mail address": "write to ann.b+c@mail.example.org|ann at gmail dot com",
    "social security number": "123-45-6789|SSN: 123456789|123\u201145\u20116789",
    "record number": "MRN 0048213|MRN: A-482133|medical record number is 48213345|chart no. 99812",
    "full date": "03/14/1961|1961-03-14|born March 14th, 1961|14 March 1961|DOB 3/14/61",
}
PLAIN = """120/80|take 500 mg twice a day|in 2008|March 14th|10-15-20|98.6|room 1204|one two three
|a 5-year-old|hemoglobin a1c 7.2|1,000,000 units|7/10|blood pressure 120-140|the record of 2008"""


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts.split("|")]
)
def test_each_kind_is_found_in_a_sentence(kind, text):
    assert find_identifiers(f"Patient: well, {text}, yes.") == [kind]


@pytest.mark.parametrize("text", PLAIN.split("|"))
def test_what_a_visit_is_full_of_is_none(text):
    assert find_identifiers(f"Doctor: it is {text.strip()}, yes.") == []


@pytest.mark.parametrize("piece", ["1", "a", "1-", "five ", "a.", "record ", "+1 ", "555 "])
def test_the_time_is_linear_in_any_text(piece):
    start = time.process_time()
    find_identifiers(piece * (300_000 // len(piece)))
    assert time.process_time() - start < 5


def test_a_run_names_counts_and_ids_and_never_the_text(tmp_path):
    rows = [{"id": f"r{i}", "dialogue": f"Doctor: {i}?", "soap": "S: pain"} for i in range(4)]
    rows[1]["dialogue"] += " Call 555-123-4567."
    rows[2]["soap"] += ", MRN 0048213"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--config", str(ROOT / "loop/configs/embedded.yaml"), f"run.dir={tmp_path}"]
    args += [
        f"data.train={tmp_path}/rows.jsonl",
        "data.valid=null",
        "data.valid_fraction=0",
        "data.headings=optional",
    ]
    args += ["monitor.sample_notes=[]", "data.test=null"]
    config = load_config(args)
    tokenizer = load_tokenizer(config.base, config.revision)
    for _ in range(2):  # the second report is the cache's
        report = load_examples(config, tokenizer, "train")[1]
        assert report.identifiers == {"phone number": ["r1"], "record number": ["r2"]}
    lines = report.lines("train", 512)
    assert "identifiers 1 of 4 in data.train, a phone number in it (data.identifiers): r1" in lines
    assert not any("555" in line or "48213" in line for line in lines)
    off = load_config([*args, "data.identifiers=off"])
    assert load_examples(off, tokenizer, "train")[1].identifiers == {}
    refused = load_config([*args, "data.identifiers=error"])
    message = "data.train: 1 with a phone number, 1 with a record number, first id r1: remove them"
    with pytest.raises(ConfigError, match=message):
        load_examples(refused, tokenizer, "train")


def test_kinds_are_those_of_the_examples():
    assert FOUND.keys() == IDENTIFIERS.keys()
