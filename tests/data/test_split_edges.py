"""Where splits begin and end: limits, marks of files, rows that are held out."""

import json

import pytest

from loop.config.cli import load_config
from loop.data.conversations import read_split
from loop.data.dataset import prepare_examples
from loop.model.loading import load_tokenizer

ROWS = [
    {"id": f"r{i}", "dialogue": f"Doctor: Tell me about the {word}.", "soap": f"S: {word}."}
    for i, word in enumerate("arm leg head back neck foot hand knee ear eye".split())
]


def write(path, rows=ROWS, mark: bytes = b"") -> str:
    path.write_bytes(mark + "".join(json.dumps(row) + "\n" for row in rows).encode())
    return str(path)


def config(train, *args):
    none = ["data.valid=null", "data.test=null", "data.valid_fraction=0"]
    files = ["--config", "loop/configs/soap_qlora.yaml", f"data.train={json.dumps(train)}"]
    return load_config([*files, *none, *args])


def ids(found) -> list[str]:
    return [conversation.id for conversation in found[0]]


@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_a_limit_is_so_many_rows_of_all_sources(tmp_path, limit):
    sources = [
        write(tmp_path / "a.jsonl", ROWS[:4]),
        write(tmp_path / "b.jsonl", ROWS[4:]),
    ]
    found = read_split(config(sources, f"data.limit={limit}"), "train")
    assert ids(found) == [row["id"] for row in ROWS[:limit]]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path, mark):
    """As Windows writes it in front of UTF-8."""
    assert ids(read_split(config(write(tmp_path / "a.jsonl", mark=mark)), "train")) == [
        row["id"] for row in ROWS
    ]
    lines = ["id,dialogue,soap", *(f"{r['id']},{r['dialogue']},{r['soap']}" for r in ROWS)]
    (tmp_path / "a.csv").write_bytes(mark + "\n".join(lines).encode())
    assert ids(read_split(config(str(tmp_path / "a.csv")), "train")) == [r["id"] for r in ROWS]


def test_rows_that_are_held_out_are_not_trained_on(tmp_path):
    train = write(tmp_path / "a.jsonl", [r | {"id": f"r{i}"} for i, r in enumerate(ROWS)])
    one = config(train, "data.valid_fraction=0.5")
    (found, problems), held_out = read_split(one, "train"), ids(read_split(one, "valid"))
    learnt = [conversation.id for conversation in found]
    assert learnt and held_out and sorted(learnt + held_out) == sorted(r["id"] for r in ROWS)
    assert not problems  # they are no leak of the validation rows


def test_a_dialogue_that_is_held_out_is_not_trained_on_under_another_id(tmp_path):
    """Half of all rows are the validation split; the other copy of some is among the rest."""
    copies = [row | {"id": f"copy-{row['id']}"} for row in ROWS]
    train = write(tmp_path / "a.jsonl", [*ROWS, *copies])
    one = config(train, "data.valid_fraction=0.5", "data.on_error=skip")
    (found, problems), (held_out, _) = read_split(one, "train"), read_split(one, "valid")
    learnt, asked = ({c.dialogue for c in split} for split in (found, held_out))
    assert learnt and asked and not learnt & asked
    assert problems and len(found) + len(held_out) + len(problems) == 2 * len(ROWS)


def test_test_rows_are_not_trained_on_and_weights_are_of_train_alone(tmp_path):
    train = write(tmp_path / "a.jsonl")
    test = write(tmp_path / "t.jsonl", [ROWS[3] | {"id": "t"}])
    valid = write(tmp_path / "v.jsonl", [ROWS[5] | {"id": "v"}])
    options = [f"data.test={test}", f"data.valid={valid}", "data.on_error=skip"]
    one = config([train], *options, "data.weights=[0.5]")
    found, problems = read_split(one, "train")
    assert not {"r3", "r5"} & {c.id for c in found} and len(problems) == 2
    assert {c.weight for c in found} == {0.5}
    assert {c.weight for split in ("valid", "test") for c in read_split(one, split)[0]} == {1.0}


def test_a_row_of_more_than_a_megabyte_is_a_bad_row(tmp_path):
    """As where a whole archive stands in a cell."""
    long = [ROWS[0] | {"dialogue": "pain " * 180_000}, ROWS[1] | {"dialogue": "pain " * 220_000}]
    found, problems = read_split(
        config(write(tmp_path / "a.jsonl", long), "data.on_error=skip"), "train"
    )
    assert [c.id for c in found] == ["r0"]
    assert "row 2" in problems[0] and "1.1 MB, more than 1 MB: split it" in problems[0]


def test_an_example_of_exactly_the_longest_length_is_kept(tmp_path, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    source = write(tmp_path / "a.jsonl")
    examples, _ = prepare_examples(config(source), tokenizer, "train")
    lengths = [len(e) for e in examples]
    longest = max(lengths)
    for limit, dropped in ((longest, 0), (longest - 1, lengths.count(longest))):
        one = config(source, f"max_seq_len={limit}")
        kept, report = prepare_examples(one, tokenizer, "train")
        assert len(kept) == len(ROWS) - dropped and len(report.dropped) == dropped
