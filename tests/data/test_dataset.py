"""What becomes of every row, and that a kept result is never a stale one."""

import json
import stat
from pathlib import Path

import pytest

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples, prepare_examples
from loop.data.soap import REQUEST
from loop.data.tokenization import PLAIN_TEMPLATE
from loop.model.loading import load_tokenizer

ROWS = [
    {
        "id": f"r{i}",
        "dialogue": f"Doctor: How are you, {i}?\nPatient: Pain, 7/10.",
        "soap": f"S: Pain {i}.\nO: -\nA: x\nP: y",
    }
    for i in range(6)
]
LONG = {
    "id": "long",
    "dialogue": "\n".join(f"Doctor: question {i}" for i in range(200)),
    "soap": "S: a",
}


@pytest.fixture
def load(tmp_path, tiny_base):
    """load(rows, key=value ...) -> (examples, account), with a cache of its own."""

    def load(rows, *args, prepare=load_examples):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        c = load_config(
            [
                "--config",
                "loop/configs/soap_qlora.yaml",
                f"base={tiny_base}",
                f"data.train={tmp_path / 'rows.jsonl'}",
                "data.valid=null",
                "data.test=null",
                "data.valid_fraction=0",
                f"run.dir={tmp_path / 'runs'}",
                "max_seq_len=1024",
                *args,
            ]
        )
        return prepare(c, load_tokenizer(tiny_base), "train")

    return load


def test_overlong_examples_are_dropped_listed_or_refused(load):
    kept, account = load([*ROWS, LONG])
    assert len(kept) == 6 and account.dropped == ["long"] and account.rows == account.kept + 1 == 7
    assert account.without_headings == 0
    with pytest.raises(ConfigError, match="id long: .* max_seq_len=1024"):
        load([*ROWS, LONG], "data.overlong=error")
    with pytest.raises(ConfigError, match="no example is left"):
        load(ROWS, "max_seq_len=20")


def test_a_truncated_dialogue_keeps_note_frame_and_both_ends(load, tiny_base):
    kept, account = load([*ROWS, LONG], "data.overlong=truncate_dialogue")
    tokenizer, example = load_tokenizer(tiny_base), kept[-1]
    text = tokenizer.decode(example.input_ids)
    assert account.truncated == ["long"] and not account.dropped and account.without_headings == 1
    assert 1024 - 40 < len(example) <= 1024  # no more turns went than had to
    assert (
        REQUEST.strip() in text
        and "question 0\n" in text
        and "question 199" in text
        and text.endswith("S: a</s>")
    )
    (marker,) = [line for line in text.splitlines() if "turns left out]" in line]
    assert text.count("Doctor: question") + int(marker[1:].split()[0]) == 200
    # where even the first and the last turn are too much, the example is dropped, not damaged
    kept, account = load(
        [*ROWS, LONG | {"dialogue": "Doctor: " + "x" * 3000 + "\nPatient: " + "y" * 3000}],
        "data.overlong=truncate_dialogue",
    )
    assert len(kept) == 6 and account.dropped == ["long"]


def test_skipped_rows_are_in_the_account_and_in_what_is_said(load):
    kept, account = load(
        [*ROWS, {"id": "empty", "dialogue": "", "soap": "S: x"}, LONG], "data.on_error=skip"
    )
    assert (account.rows, account.kept, len(account.skipped), account.dropped) == (
        8,
        6,
        1,
        ["long"],
    )
    said = "\n".join(account.lines("train", 1024))
    assert (
        "1 of 8 in data.train, bad rows" in said
        and "(id empty)" in said
        and "longer than 1,024 tokens: long" in said
    )


def test_a_base_without_a_template_is_told_of(load, monkeypatch):
    plain = load_tokenizer

    def without(base):
        tokenizer = plain(base)
        tokenizer.chat_template = PLAIN_TEMPLATE  # as load_tokenizer does
        return tokenizer

    assert not any("template" in line for line in load(ROWS)[1].lines("train", 1024))
    monkeypatch.setitem(globals(), "load_tokenizer", without)
    assert any("plain one is used" in line for line in load(ROWS)[1].lines("train", 1024))


def test_the_second_start_reads_the_first_ones_result(load, monkeypatch):
    first, account = load([*ROWS, LONG])
    monkeypatch.setattr("loop.data.dataset.prepare_examples", None)
    second, again = load([*ROWS, LONG])
    assert again == account
    for a, b in zip(first, second, strict=True):
        assert (
            a.id == b.id
            and a.weight == b.weight
            and (a.input_ids == b.input_ids).all()
            and (a.labels == b.labels).all()
        )


@pytest.mark.parametrize(
    "change",
    [
        "a byte of the data",
        "max_seq_len=1000",
        "data.overlong=truncate_dialogue",
        "data.supervise=all",
        "template",
        "tokenizer",
        "code",
    ],
)
def test_a_stale_result_is_never_read(change, load, monkeypatch, tiny_base):
    """Whatever the result depends on: when it changes, the examples are made anew and are those of a start without a cache."""
    load(ROWS)
    rows, args, made = list(ROWS), [], []
    plain = load_tokenizer
    if change == "a byte of the data":
        rows[3] = rows[3] | {"soap": rows[3]["soap"].replace("y", "z")}
    elif change == "template":
        monkeypatch.setitem(
            globals(), "load_tokenizer", lambda base: changed(plain(base), "chat_template")
        )
    elif change == "tokenizer":
        monkeypatch.setitem(
            globals(), "load_tokenizer", lambda base: changed(plain(base), "vocabulary")
        )
    elif change == "code":
        read = Path.read_bytes
        monkeypatch.setattr(
            Path,
            "read_bytes",
            lambda path: read(path) + (b"# changed" if path.name == "tokenization.py" else b""),
        )
    else:
        args = [change]
    prepare = prepare_examples
    monkeypatch.setattr(
        "loop.data.dataset.prepare_examples", lambda *a: made.append(1) or prepare(*a)
    )
    kept, account = load(rows, *args)
    assert made == [1]
    expected, _ = load(rows, *args, "data.cache=false")
    assert len(kept) == len(expected)
    assert all(
        (a.input_ids == b.input_ids).all() and (a.labels == b.labels).all()
        for a, b in zip(kept, expected)
    )


def changed(tokenizer, what: str):
    if what == "chat_template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|", "<<")
    else:
        tokenizer.add_tokens(["Pain"])
    return tokenizer


def test_the_cache_is_the_owners_alone_and_a_torn_file_is_made_anew(load, tmp_path):
    first, _ = load(ROWS)
    folder = tmp_path / "runs" / ".tokens"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    second, _ = load(ROWS)
    assert [e.input_ids.tolist() for e in first] == [e.input_ids.tolist() for e in second]
    load(ROWS, "data.cache=false", f"run.dir={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_costs_time_only(load, tmp_path):
    (tmp_path / "file").write_text("")
    kept, _ = load(ROWS, f"run.dir={tmp_path / 'file'}")
    assert len(kept) == 6
