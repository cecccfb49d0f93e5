"""Seeing what is trained on."""

import dataclasses
import json
import stat

import pytest

from loop.commands.preview import check_examples, describe_documents, main, show_example
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.conversations import read_split
from loop.data.dataset import load_examples
from loop.model.loading import load_tokenizer


@pytest.fixture
def loaded(config_file):
    config = load_config(["--config", str(config_file)])
    tokenizer = load_tokenizer(config.base)
    examples, _ = load_examples(config, tokenizer, "train")
    conversations = {c.id: c for c in read_split(config, "train")[0]}
    return tokenizer, examples, conversations


def test_the_tokens_shown_are_the_examples(loaded):
    tokenizer, examples, _ = loaded
    shown = show_example(examples[1], tokenizer, color=False)
    marked = shown.split("|[")[1:]
    assert len(marked) == examples[1].num_targets and marked[-1] == "</s>]"
    assert "\033[32m" in show_example(examples[1], tokenizer, color=True)


def test_a_packed_row_says_where_each_document_lies(loaded):
    tokenizer, examples, _ = loaded
    a, b = examples[:2]
    heads = [head for head, _ in describe_documents([a, b], tokenizer)]
    last = len(a) + len(b) - 1
    assert f"tokens {len(a)} to {last} of the row, positions 0 to {len(b) - 1}" in heads[1]


def writeable(example):
    """A copy: examples of the cache are views of its file."""
    return dataclasses.replace(example, labels=example.labels.copy())


def test_the_checks_hold_and_each_finds_its_fault(loaded):
    tokenizer, examples, conversations = loaded
    lines = check_examples(examples, conversations, tokenizer, set())
    assert "40 examples" in lines[0] and "40 examples" in lines[1]
    e = writeable(examples[0])
    e.labels[-1] = -100
    with pytest.raises(ConfigError, match="id train-0: .* supervised '</s>'"):
        check_examples([e], conversations, tokenizer, set())
    e.labels[-1] = e.input_ids[-1]
    e.labels[3] = e.input_ids[3]  # a token of the prompt supervised
    with pytest.raises(ConfigError, match="id train-0: what generation would be fed"):
        check_examples([e], conversations, tokenizer, set())
    e = writeable(examples[1])
    e.labels[-3] = -100  # a token of the note unsupervised
    with pytest.raises(ConfigError, match="id train-1: the supervised tokens do not decode"):
        check_examples([e], conversations, tokenizer, set())


def test_the_commands(config_file, capsys, tmp_path):
    main(["--config", str(config_file), "--id", "train-3"])
    out = capsys.readouterr().out
    assert out.startswith("train-3: ")
    assert "every answer ends in a supervised '</s>' (40 examples)" in out
    page = tmp_path / "p.html"
    main(["--config", str(config_file), "--step", "0", "--html", str(page)])
    out, html = capsys.readouterr().out, page.read_text()
    assert "packed row 0: " in out and "document 1: id train-" in html
    assert html.startswith("<!doctype html>") and "src=" not in html
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    for args, words in (
        (["--id", "nobody"], "--id nobody"),
        (["--rows", "x"], "--rows x"),
        (["--step", "999"], "--step 999: must be"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(config_file), *args])
        assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_dialogues_markup_stays_text_on_the_page(config_file, tmp_path, capsys):
    row = {"id": "a", "dialogue": "Doctor: <script>alert(1)</script>", "soap": "S: <b>x</b>"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    page = tmp_path / "m.html"
    data = f"data.train={tmp_path / 'm.jsonl'}"
    main(["--config", str(config_file), data, "--html", str(page)])
    text = page.read_text()
    assert "<script>" not in text and "&lt;" in text
