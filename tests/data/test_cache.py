"""The key of the token cache covers the whole package, whatever its files are called."""

import errno
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from loop.config import source
from loop.config.cli import load_config
from loop.data import cache
from loop.data.cache import cache_key, read_cache
from loop.data.dataset import load_examples, prepare_examples, visit_weights
from loop.data.soap import SOAP
from loop.model.loading import load_tokenizer

ROWS = [
    {"id": f"r{i}", "dialogue": f"Doctor: How are you, {i}?", "soap": f"S: Pain {i}."}
    for i in range(4)
]


@pytest.fixture
def run(tmp_path, tiny_base, monkeypatch):
    """(configuration, tokenizer, folder): a run whose package loop/data is a copy in `folder`."""
    package = tmp_path / "loop" / "data"
    shutil.copytree(ROOT / "loop" / "data", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "ROOT", tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = load_config(
        [
            "--config",
            str(ROOT / "loop" / "configs" / "soap_qlora.yaml"),
            f"base={tiny_base}",
            f"data.train={tmp_path / 'rows.jsonl'}",
            "data.valid=null",
            "data.test=null",
            "data.valid_fraction=0",
            f"run.dir={tmp_path / 'runs'}",
        ]
    )
    return config, load_tokenizer(tiny_base), package


def move_a_file(package):
    (package / "formats").mkdir()
    (package / "sources" / "readers.py").rename(package / "formats" / "readers.py")


def add_a_file(package):
    (package / "visit_reader.py").write_text('SUFFIX = ".visit"\n')


@pytest.mark.parametrize("change", [move_a_file, add_a_file])
def test_a_moved_or_added_file_makes_the_examples_anew(run, change):
    config, tokenizer, package = run
    before = cache_key(config, tokenizer, "train")
    first, _ = load_examples(config, tokenizer, "train")
    change(package)
    assert cache_key(config, tokenizer, "train") != before
    second, _ = load_examples(config, tokenizer, "train")
    assert [e.id for e in second] == [e.id for e in first]
    files = {path.stem for path in (package.parents[1] / "runs/.tokens").glob("*.safetensors")}
    assert files == {before, cache_key(config, tokenizer, "train")}


def test_what_is_read_is_what_was_made_and_stays_in_the_file(run):
    config, tokenizer, package = run
    made = prepare_examples(config, tokenizer, "train")
    first, again = (load_examples(config, tokenizer, "train") for _ in range(2))
    assert made[1] == first[1] == again[1]
    for own, *others in zip(made[0], first[0], again[0], strict=True):
        for other in others:
            assert (own.id, own.weight) == (other.id, other.weight)
            for name in ("input_ids", "labels"):
                view = getattr(other, name)
                assert np.array_equal(getattr(own, name), view) and view.dtype == np.int32
                assert not view.flags.owndata and not view.flags.writeable
    (path,) = (package.parents[1] / "runs/.tokens").glob("*.safetensors")
    content = path.read_bytes()
    for damaged in (content[:-4], content[:40], b"", content.replace(b"labels", b"lables")):
        path.write_bytes(damaged)
        assert read_cache(path) is None


def test_splits_have_keys_of_their_own(run):
    config, tokenizer, _ = run
    assert cache_key(config, tokenizer, "train") == cache_key(config, tokenizer, "train")
    assert cache_key(config, tokenizer, "train") != cache_key(config, tokenizer, "valid")


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_len": 100},
        {"task": SOAP.model_copy(update={"system": "Be short."})},
        {"data": {"weights": [0.5]}},
        {"data": {"limit": 3}},
        {"data": {"supervise": "all"}},
    ],
)
def test_what_changes_the_examples_changes_the_key(run, change):
    config, tokenizer, _ = run
    data = config.data.model_copy(update=change.pop("data", {}))
    other = config.model_copy(update={"data": data} | change)
    assert cache_key(other, tokenizer, "train") != cache_key(config, tokenizer, "train")


def test_the_key_is_of_the_template_and_of_the_special_tokens(run):
    config, tokenizer, _ = run
    keys = [cache_key(config, tokenizer, "train")]
    tokenizer.eos_token = "<pad>"  # in the vocabulary before: the backend is the same
    keys.append(cache_key(config, tokenizer, "train"))
    tokenizer.chat_template += " "
    keys.append(cache_key(config, tokenizer, "train"))
    assert len(set(keys)) == 3


def test_weights_survive_the_cache(run):
    config, tokenizer, _ = run
    data = config.data.model_copy(update={"train": [config.data.train], "weights": [0.25]})
    weighted = config.model_copy(update={"data": data})
    for _ in range(2):
        examples, _ = load_examples(weighted, tokenizer, "train")
        assert {e.weight for e in examples} == {0.25}
        assert visit_weights(examples).tolist() == [0.25] * 4


def test_the_files_used_longest_ago_are_removed(run, monkeypatch):
    config, tokenizer, _ = run
    monkeypatch.setattr(cache, "MAX_FILES", 2)
    keys = []
    for tokens in (1001, 1002, 1003, 1004):
        other = config.model_copy(update={"max_seq_len": tokens})
        load_examples(other, tokenizer, "train")
        keys.append(cache_key(other, tokenizer, "train"))
    folder, newest = Path(config.run.dir) / ".tokens", set(keys[-2:])
    assert {path.stem for path in folder.glob("*.safetensors")} == newest
    assert {path.stem for path in folder.glob("*.lock")} == newest


def test_without_a_cache_nothing_is_written(run):
    config, tokenizer, _ = run
    data = config.data.model_copy(update={"cache": False})
    examples, _ = load_examples(config.model_copy(update={"data": data}), tokenizer, "train")
    assert len(examples) == len(ROWS) and not (Path(config.run.dir) / ".tokens").exists()


def test_writing_needs_no_second_copy_and_a_full_disk_keeps_nothing(run, tmp_path, monkeypatch):
    config, tokenizer, _ = run
    examples, report = prepare_examples(config, tokenizer, "train")
    path = tmp_path / "tokens.safetensors"
    many = examples * 5000
    tracemalloc.start()
    cache.write_cache(path, many, report)
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    tracemalloc.stop()
    assert len(read_cache(path)[0]) == len(many)
    path.unlink()

    def full(*_):
        path.with_suffix(".writing").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_save_tensors", full)
    cache.write_cache(path, examples, report)
    assert not [*tmp_path.glob("tokens.*")]
