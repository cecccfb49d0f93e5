"""What becomes of every row, and that the cache never gives an outdated result."""

import json
import stat
from pathlib import Path

import pytest
from tokenizers import normalizers

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples, load_training_data, note_change, prepare_examples
from loop.data.soap import SOAP
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
    """load(rows, key=value ...) -> (examples, report), with a cache of its own."""

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


def test_repeated_rows_and_rewritten_headings_are_counted(load):
    again = [ROWS[0] | {"id": f"again{i}"} for i in range(2)]
    other = {"dialogue": "Doctor: And?", "soap": "Subjective: a\n**O:** b\nA/P: c\nP: d"}
    rows = [*ROWS, *again, other | {"id": "styled"}]
    for _ in range(2):  # the second report is the cache's
        examples, report = load(rows, "data.normalize_headings=true", "data.headings=required")
        assert len(examples) == 9 and report.duplicates == 2
        assert (report.notes_normalized, report.headings_normalized) == (1, 3)
        assert report.lines("train", 1024) == [
            "normalized  3 headings of 1 notes in data.train are written as S:, O:, A:, P: now",
            "duplicates  2 of 9 examples in data.train repeat an earlier one word for word, and "
            "count twice",
        ]
    report = load(rows)[1]
    assert (report.notes_normalized, report.without_headings, report.duplicates) == (0, 1, 2)
    with pytest.raises(ConfigError, match=r"row 9 \(id styled\): the note lacks S:, O:, A:, P:"):
        load(rows, "data.headings=required", "data.on_error=stop")


def test_the_data_of_a_run_is_loaded_in_one_call(load, tmp_path, tiny_base):
    rows = "".join(json.dumps(r | {"dialogue": f"Patient {r['id']}."}) + "\n" for r in ROWS[:3])
    (tmp_path / "valid.jsonl").write_text(rows)

    def load_all(config, tokenizer, split):
        return load_training_data(config, tokenizer)

    valid = f"data.valid={tmp_path / 'valid.jsonl'}"
    data = load(ROWS, valid, "monitor.sample_notes=[r2, r0]", prepare=load_all)
    assert [e.id for e in data.train] == [r["id"] for r in ROWS]
    assert [e.id for e in data.valid] == ["r0", "r1", "r2"]
    assert [e.id for e in data.samples] == ["r0", "r2"]  # in the order of the split
    assert data.lengths.tolist() == [len(e) for e in data.train]
    assert data.num_targets.tolist() == [e.num_targets for e in data.train]
    assert data.supervised_fraction == sum(data.num_targets) / sum(data.lengths)
    assert data.weights is None
    assert {split: report.kept for split, report in data.reports.items()} == {
        "train": 6,
        "valid": 3,
    }
    with pytest.raises(ConfigError, match="monitor.sample_notes: r9 is not an id of data.valid"):
        load(ROWS, valid, "monitor.sample_notes=[r9]", prepare=load_all)
    weighted = [str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl")]
    (tmp_path / "more.jsonl").write_text(json.dumps(ROWS[0] | {"id": "again"}) + "\n")
    args = [
        f"data.train={json.dumps(weighted)}",
        "data.weights=[1, 0.5]",
        "monitor.sample_notes=[]",
    ]
    data = load(ROWS, *args, prepare=load_all)
    assert data.weights.tolist() == [1.0] * 6 + [0.5]
    assert data.valid == data.samples == []


def test_with_supervise_all_every_token_is_learned(load):
    (note, _), (whole, _) = load(ROWS), load(ROWS, "data.supervise=all")
    for one, other in zip(note, whole, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.num_targets < other.num_targets == len(other) - 1


def test_overlong_examples_are_dropped_listed_or_refused(load):
    examples, report = load([*ROWS, LONG])
    assert len(examples) == 6 and report.dropped == ["long"] and report.rows == report.kept + 1 == 7
    assert report.without_headings == 0
    with pytest.raises(ConfigError, match="id long: .* max_seq_len=1024"):
        load([*ROWS, LONG], "data.overlong=error")
    with pytest.raises(ConfigError, match="no example is left"):
        load(ROWS, "max_seq_len=20")


def test_a_truncated_dialogue_keeps_note_frame_and_both_ends(load, tiny_base):
    examples, report = load([*ROWS, LONG], "data.overlong=truncate_dialogue")
    tokenizer, example = load_tokenizer(tiny_base), examples[-1]
    text = tokenizer.decode(example.input_ids)
    assert report.truncated == ["long"] and not report.dropped and report.without_headings == 1
    assert 1024 - 40 < len(example) <= 1024  # no more turns went than had to
    assert (
        SOAP.request.strip() in text
        and "question 0\n" in text
        and "question 199" in text
        and text.endswith("S: a</s>")
    )
    (marker,) = [line for line in text.splitlines() if "turns left out]" in line]
    assert text.count("Doctor: question") + int(marker[1:].split()[0]) == 200
    # where even the first and the last turn are too much, the example is dropped, not damaged
    examples, report = load(
        [*ROWS, LONG | {"dialogue": "Doctor: " + "x" * 3000 + "\nPatient: " + "y" * 3000}],
        "data.overlong=truncate_dialogue",
    )
    assert len(examples) == 6 and report.dropped == ["long"]


def test_skipped_rows_are_in_the_report_and_its_lines(load):
    examples, report = load(
        [*ROWS, {"id": "empty", "dialogue": "", "soap": "S: x"}, LONG], "data.on_error=skip"
    )
    assert (report.rows, report.kept, len(report.skipped), report.dropped) == (
        8,
        6,
        1,
        ["long"],
    )
    lines = "\n".join(report.lines("train", 1024))
    assert (
        "1 of 8 in data.train, bad rows" in lines
        and "(id empty)" in lines
        and "longer than 1,024 tokens: long" in lines
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
    first, report = load([*ROWS, LONG])
    monkeypatch.setattr("loop.data.dataset.prepare_examples", None)
    second, again = load([*ROWS, LONG])
    assert again == report
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
    """Whatever the result depends on: when it changes, the examples are those without a cache."""
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
    examples, report = load(rows, *args)
    assert made == [1]
    expected, _ = load(rows, *args, "data.cache=false")
    assert len(examples) == len(expected)
    assert all(
        (a.input_ids == b.input_ids).all() and (a.labels == b.labels).all()
        for a, b in zip(examples, expected)
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
    examples, _ = load(ROWS, f"run.dir={tmp_path / 'file'}")
    assert len(examples) == 6


def test_a_note_that_the_tokenizer_changes_is_told_apart():
    assert note_change("S: a\nP: b", " S: a\nP: b") == ""
    assert note_change("S: a\nP: 5 µg", "S: a P: 5 μg") == "changed"
    assert note_change("S: Pain", "s: pain") == "lost"


def test_a_tokenizer_that_can_write_no_note_is_refused(config_file):
    config = load_config(["--config", str(config_file), "data.cache=false"])
    tokenizer = load_tokenizer(config.base)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="can write none of the notes of data.train"):
        load_examples(config, tokenizer, "train")


STRICT_TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_chats_that_the_template_refuses_are_skipped_and_counted(load):
    def prepare(config, tokenizer, split):
        tokenizer.chat_template = STRICT_TEMPLATE
        return prepare_examples(config, tokenizer, split)

    def chat(name, *roles):
        turns = [{"role": role, "content": f"secret {i}"} for i, role in enumerate(roles)]
        return {"id": name, "messages": turns}

    pair = ("user", "assistant")
    bad = [chat("twice", "user", *pair), chat("answers", *pair, "assistant")]
    rows = [chat("a", *pair), *bad, chat("b", *pair, *pair), chat("tail", *pair, "user")]
    words = ["data.columns={messages: messages}"]
    with pytest.raises(ConfigError) as stopped:
        load(rows, *words, "data.on_error=stop", prepare=prepare)
    assert "data.train, id twice: the base's chat template refuses" in str(stopped.value)
    assert "data.on_error=skip" in str(stopped.value) and "secret" not in str(stopped.value)
    examples, report = load(rows, *words, "data.on_error=skip", prepare=prepare)
    assert [e.id for e in examples] == ["a", "b", "tail"]
    assert report.rows == 5 == report.kept + len(report.skipped)
    assert ["id twice" in report.skipped[0], "id answers" in report.skipped[1]] == [True, True]
    assert "secret" not in "".join(report.skipped)


def test_html_that_was_left_in_the_texts_is_counted(load):
    texts = ["BP &lt; 120", "a<br>b", "a<BR/>b", "<p class='x'>a</p>", "it&#39;s"]
    others = ["T < 37 and > 36", "a & b", "<3", "R&amp", "<b"]
    rows = [
        {"id": f"m{i}", "dialogue": f"Doctor: {i}", "soap": f"S: {text}"}
        for i, text in enumerate(texts + others)
    ]
    _, report = load([*ROWS, *rows], "data.headings=optional")
    assert report.with_markup == len(texts)
    (line,) = [line for line in report.lines("train", 1024) if line.startswith("markup")]
    assert "5 of 16 examples in data.train hold HTML" in line
