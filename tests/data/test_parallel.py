"""Rows are prepared by several processes as by one."""

import json
import os
import signal

import numpy as np
import pytest
from helpers import ROOT

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data import parallel
from loop.data.cache import write_cache
from loop.data.dataset import prepare_examples
from loop.data.decontamination import find_near_duplicates
from loop.model.loading import load_tokenizer

ROWS = (ROOT / "loop/embedded/data/train.jsonl").read_text().splitlines()[:90]
FIRST_ID = json.loads(ROWS[0])["id"]
CHUNKS = [[i, i + 1] for i in range(0, 20, 2)]


@pytest.fixture(params=[1, 3])
def processes(request, monkeypatch):
    monkeypatch.setattr(parallel, "CHUNK", 16)
    monkeypatch.setattr(parallel, "count_processes", lambda *_: request.param)
    return request.param


def prepare(tmp_path, split="train", *words):
    rows = list(map(json.loads, ROWS))
    rows[7]["soap"] = "No headings."
    rows[20]["dialogue"] += "\nPatient: Call me at 555-201-3344."
    rows[30] |= {"dialogue": "Doctor: </s> Pain?"}
    rows[40]["dialogue"] = rows[41]["dialogue"]
    held_out = [{"id": "held", "dialogue": rows[50]["dialogue"], "soap": "S: a"}]
    for name, some in (("train", rows), ("valid", held_out)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    config = load_config(
        [
            *("--config", str(ROOT / "loop/configs/embedded.yaml"), "data.on_error=skip"),
            *(f"data.train={tmp_path / 'train.jsonl'}", f"data.valid={tmp_path / 'valid.jsonl'}"),
            *("data.test=null", "monitor.sample_notes=[]", "data.headings=optional", *words),
        ]
    )
    return prepare_examples(config, load_tokenizer(config.base), split)


def test_examples_report_and_cache_file_are_the_same_to_the_byte(tmp_path, monkeypatch):
    written = []
    for processes in (1, 3):
        monkeypatch.setattr(parallel, "CHUNK", 16)
        monkeypatch.setattr(parallel, "count_processes", lambda *_: processes)
        examples, report = prepare(tmp_path)
        path = tmp_path / f"{processes}.safetensors"
        write_cache(path, examples, report)
        written.append((path.read_bytes(), report))
    assert written[0] == written[1]
    assert report.rows == 90 and len(report.skipped) == 1 and report.without_headings == 1
    assert report.identifiers == {"phone number": [examples[20].id]}
    assert np.concatenate([e.input_ids for e in examples]).size > 1000


def test_a_leak_is_named_with_its_place(processes):
    texts = [f"{'abcdefghij'[i % 10] * 3} text number {i} " * 30 for i in range(100)]
    assert find_near_duplicates(texts, [texts[70]]) == [(70, 0, "the same dialogue")]


def test_the_first_mistake_is_raised(tmp_path, processes):
    with pytest.raises(ConfigError, match=rf"id {FIRST_ID}: \d+ tokens, more than"):
        prepare(tmp_path, "train", "max_seq_len=64", "data.overlong=error")


def test_results_come_in_order_and_errors_with_them(processes):
    def invert(chunk):
        return [1 / (7 - number) for number in chunk]

    found = parallel.map_chunks(invert, CHUNKS)
    assert [next(found) for _ in range(3)] == [invert(chunk) for chunk in CHUNKS[:3]]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_work_is_done_where_processes_die(monkeypatch):
    monkeypatch.setattr(parallel, "count_processes", lambda *_: 2)
    this = os.getpid()

    def die_in_a_fork(chunk):
        if chunk[0] == 6 and os.getpid() != this:
            os.kill(os.getpid(), signal.SIGKILL)
        return chunk

    assert list(parallel.map_chunks(die_in_a_fork, CHUNKS)) == CHUNKS


def test_few_rows_are_not_worth_processes():
    assert parallel.count_processes(parallel.FEWEST_CHUNKS - 1) == 1
    cores = len(os.sched_getaffinity(0))
    assert parallel.count_processes(1000) == min(1000, cores)
    assert parallel.count_processes(1000, sharing=cores) == 1


def test_ranks_that_work_at_once_share_the_cores(monkeypatch):
    shared = []
    monkeypatch.setattr(parallel, "count_processes", lambda n, sharing: shared.append(sharing) or 1)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    for on_all_ranks in (False, True):
        assert list(parallel.map_chunks(sum, CHUNKS, on_all_ranks)) == list(map(sum, CHUNKS))
    assert shared == [1, 8]
