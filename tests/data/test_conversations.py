"""Every row of every format is kept or listed, whatever the file holds; no message quotes it."""

import json

import pandas
import pytest
from helpers import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.conversations import Conversation, dialogue_text, is_held_out, note_text, read_split
from loop.data.soap import soap_messages
from loop.data.sources.readers import READERS

ROWS = [
    {
        "id": f"r{i}",
        "dialogue": f"Doctor: How are you, {i}?\nPatient: Pain, 7/10.",
        "soap": f"S: Pain {i}.\nO: -\nA: x\nP: y",
    }
    for i in range(6)
]
SECRET = "hemochromatosis"


def write(folder, kind: str, rows=ROWS, name: str = "rows"):
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.mkdir()
        for r in rows:
            (path / f"{r['id']}.dialogue.txt").write_text(r["dialogue"])
            (path / f"{r['id']}.note.txt").write_text(r["soap"])
    return str(path)


def config(source, *args):
    return load_config(
        [
            "--config",
            "loop/configs/soap_qlora.yaml",
            f"data.train={json.dumps(source)}",
            "data.valid=null",
            "data.test=null",
            "data.valid_fraction=0",
            "data.on_error=stop",
            *args,
        ]
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "pairs"])
def test_each_format_gives_the_same_conversations(kind, tmp_path):
    found, problems = read_split(
        config(write(tmp_path, kind), "data.columns={id: id, dialogue: dialogue, note: soap}"),
        "train",
    )
    assert [(c.id, c.messages, c.dialogue, c.note) for c in found] == [
        (r["id"], soap_messages(r["dialogue"], r["soap"]), r["dialogue"], r["soap"]) for r in ROWS
    ]
    assert problems == []


def test_a_folder_in_the_hubs_layout_and_a_list_of_weighted_sources(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pandas.DataFrame(ROWS).drop(columns="id").to_parquet(folder / "train-00000-of-00001.parquet")
    other = [
        {"dialogue": "Doctor: something else altogether, a longer sentence " * 3, "soap": "S: x"}
    ]
    pandas.DataFrame(other).to_parquet(folder / "validation-00000-of-00001.parquet")
    c = config(
        [str(tmp_path / "set"), write(tmp_path, "jsonl")],
        f"data.valid={tmp_path / 'set'}",
        "data.weights=[2, 0.5]",
    )
    found = read_split(c, "train")[0]
    assert [x.id for x in found] == [f"train-{i}" for i in range(6)] + [r["id"] for r in ROWS]
    assert [x.weight for x in found] == [2.0] * 6 + [0.5] * 6
    assert [x.id for x in read_split(c, "valid")[0]] == ["validation-0"]
    with pytest.raises(ConfigError, match="data.weights"):
        config("a.jsonl", "data.weights=[1, 2]")


def test_sources_with_other_columns_mix(tmp_path):
    second = [
        {"key": i, "conversation": r["dialogue"], "summary": r["soap"]} for i, r in enumerate(ROWS)
    ]
    columns = (
        "data.columns={id: [key, id], dialogue: [dialogue, conversation], note: [soap, summary]}"
    )
    found, _ = read_split(
        config([write(tmp_path, "jsonl"), write(tmp_path, "csv", second, "two")], columns), "train"
    )
    assert len(found) == 12 and found[0].messages == found[6].messages and found[7].id == "1"


BAD = {
    "no column 'soap'": {"dialogue": SECRET},
    "dialogue is empty": {"dialogue": " ", "soap": SECRET},
    "note is int, not a text": {"dialogue": SECRET, "soap": 3},
    "note is NoneType": {"dialogue": SECRET, "soap": None},
    "occurs twice, first in": {"id": "r0", "dialogue": SECRET, "soap": SECRET},
    "at most 100 characters long": {"id": "x" * 101, "dialogue": "x", "soap": SECRET},
    "its id must be": {"id": f"{SECRET} is what he has", "dialogue": "x", "soap": "y"},
    "more than 1 MB": {"dialogue": SECRET * 700_000, "soap": "S: x"},
    "dialogue is not UTF-8": {"dialogue": SECRET + "\ud800", "soap": "S: x"},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_row_is_named_with_a_remedy_and_without_its_words(words, tmp_path):
    path = write(tmp_path, "jsonl", [*ROWS, BAD[words]])
    with pytest.raises(ConfigError, match="rows.jsonl, row 7") as caught:
        read_split(config(path), "train")
    assert (
        words in str(caught.value)
        and SECRET not in str(caught.value)
        and len(str(caught.value)) < 400
    )
    found, problems = read_split(config(path, "data.on_error=skip"), "train")
    assert len(found) == 6 and len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("jsonl", lambda b: b[:-20], "row 6: is not a whole JSON object"),
        ("jsonl", lambda b: b.replace(b"Pain 2", b"Pain \xff"), "row 3: is not UTF-8"),
        ("json", lambda b: b[:-20], "not one whole JSON array"),
        ("csv", lambda b: b.replace(b"Pain 2", b"Pain \xff"), "row 3 (id r2): note is not UTF-8"),
        ("csv", lambda b: b + b"a,b\n", "row 7: has another number of fields"),
        ("csv", lambda b: b[:-20], "row 6: cannot be read as CSV"),
        ("parquet", lambda b: b[:-20], "cannot be read as Parquet"),
        ("jsonl", lambda b: b + b'"a text"\n', "row 7: is not an object"),
        (
            "csv",
            lambda b: b.split(b"\n", 1)[1],
            "no column 'dialogue', only 3 that don't look like names (has the file a header?)",
        ),
    ],
)
def test_a_damaged_file(kind, damage, words, tmp_path):
    path = write(tmp_path, kind)
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(damage(content))
    with pytest.raises(ConfigError) as caught:
        read_split(config(path), "train")
    assert (
        words in str(caught.value)
        and "Pain" not in str(caught.value)
        and "Doctor" not in str(caught.value)
    )


def test_pairs_lack_a_partner(tmp_path):
    path = write(tmp_path, "pairs")
    (tmp_path / "rows.pairs" / "r3.note.txt").unlink()
    with pytest.raises(ConfigError, match="r3.note.txt is missing"):
        read_split(config(path), "train")


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
        yield

    monkeypatch.setitem(READERS, ".jsonl", refuse)
    with pytest.raises(ConfigError, match=r"rows.jsonl: cannot be read \(Permission denied\)"):
        read_split(config(path), "train")
    with pytest.raises(ConfigError, match="has no messages; map dialogue and note"):
        read_split(config(write(tmp_path, "pairs"), "data.columns={messages: messages}"), "train")


def test_missing_sources_are_named():
    with pytest.raises(ConfigError, match="data.train=nowhere.jsonl: no such file"):
        read_split(config("nowhere.jsonl"), "train")


def test_headings_can_be_required(tmp_path):
    path = write(
        tmp_path, "jsonl", [*ROWS, {"id": "bare", "dialogue": "Doctor: hi", "soap": "He is fine."}]
    )
    assert len(read_split(config(path), "train")[0]) == 7
    with pytest.raises(ConfigError, match=r"row 7 \(id bare\): the note lacks S:, O:, A:, P:"):
        read_split(config(path, "data.headings=required"), "train")


def test_the_validation_fraction_follows_the_id_or_the_dialogue_alone(tmp_path):
    rows = [
        {"id": f"x{i}", "dialogue": f"Doctor: {i} {hash(str(i))} {i * 7919} {i**5}", "soap": "S: a"}
        for i in range(400)
    ]
    args = ["data.valid_fraction=0.1", "data.on_error=skip"]
    train, valid = (
        read_split(config(write(tmp_path, "jsonl", rows), *args), split)[0]
        for split in ("train", "valid")
    )
    assert {c.id for c in train} | {c.id for c in valid} == {r["id"] for r in rows}
    assert 20 < len(valid) < 60
    assert all(is_held_out(c, 0.1) for c in valid) and not any(is_held_out(c, 0.1) for c in train)
    again = read_split(config(write(tmp_path, "jsonl", rows[::-2]), *args), "valid")[0]
    assert {c.id for c in again} == {c.id for c in valid} & {r["id"] for r in rows[::-2]}
    # Without ids, rows are numbered, and the numbers change with the rows before them.
    bare = [{k: v for k, v in r.items() if k != "id"} for r in rows]
    held_out = [
        {c.dialogue for c in read_split(config(write(tmp_path, "jsonl", some), *args), "valid")[0]}
        for some in (bare, bare[1:])
    ]
    assert 20 < len(held_out[0]) < 60 and held_out[0] - {bare[0]["dialogue"]} == held_out[1]


def test_dialogue_and_note_of_a_row_of_messages():
    def row(*turns: str) -> Conversation:
        return Conversation(
            "a",
            [
                {"role": dict(s="system", u="user", a="assistant")[turn[0]], "content": turn}
                for turn in turns
            ],
        )

    talk = row("s1", "u1", "a1", "u2", "a2", "u3")
    assert dialogue_text(talk) == "u1\nu2\nu3" and note_text(talk) == "a2"
    assert dialogue_text(row("s1", "a1")) == "s1"  # else all such rows would count as one dialogue


def test_a_training_dialogue_that_is_held_out_as_well_is_a_bad_row(tmp_path):
    held_out = write(tmp_path, "jsonl", [{**ROWS[2], "id": "v"}], "valid")
    path = write(tmp_path, "jsonl")
    with pytest.raises(
        ConfigError,
        match=r"row 3 \(id r2\): the same dialogue as that of held-out id v: remove one",
    ):
        read_split(config(path, f"data.valid={held_out}"), "train")
    found, problems = read_split(
        config(path, f"data.test={held_out}", "data.on_error=skip"), "train"
    )
    assert "r2" not in {c.id for c in found} and len(found) + len(problems) == 6


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real dialogues (ACI-Bench, MTS-Dialog) are not on this machine"
)
@pytest.mark.parametrize("name", ["aci_bench", "mts_dialog"])
def test_real_dialogues_load_by_column_mapping(name):
    folder = SHARED / "data" / name
    c = config(
        str(folder / "train.jsonl"),
        f"data.valid={folder / 'valid.jsonl'}",
        f"data.test={folder / 'test1.jsonl'}",
    )
    ids = [json.loads(line)["id"] for line in (folder / "train.jsonl").open()]
    found, problems = read_split(c, "train")
    assert [x.id for x in found] == ids and not problems


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda v: st.lists(v, max_size=3),
    max_leaves=4,
)
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["id", "dialogue", "soap", "x"]), st.text(max_size=12) | VALUES, max_size=4
    ),
    max_size=6,
)


@pytest.mark.parametrize("kind", READERS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=RECORDS, at=st.integers(0, 2000), junk=st.binary(max_size=6), cut=st.booleans())
def test_no_file_is_so_broken_that_a_row_is_lost(tmp_path, kind, rows, at, junk, cut):
    """Random rows in each format, then bytes overwritten, inserted or cut off anywhere.

    All rows are kept or listed.
    """
    if kind == ".xlsx":
        pytest.importorskip("openpyxl")
    path = tmp_path / f"fuzz{kind}"
    if kind in (".jsonl", ".ndjson"):
        content = b"".join(json.dumps(r).encode() + b"\n" for r in rows)
    elif kind == ".json":
        content = json.dumps(rows).encode()
    else:
        frame = pandas.DataFrame(
            [{k: str(v) for k, v in r.items()} for r in rows] or [{"dialogue": "a", "soap": "b"}]
        )
        content = (
            frame.map(lambda v: str(v).encode("utf-8", "replace").decode())
            .to_csv(index=False, sep="\t" if kind == ".tsv" else ",")
            .encode()
        )
        if kind == ".parquet":
            frame.map(lambda v: str(v).encode("utf-8", "replace").decode()).to_parquet(path)
            content = path.read_bytes()
    at %= len(content) + 1
    content = content[:at] + junk + (b"" if cut else content[at + len(junk) // 2 :])
    path.write_bytes(content)
    try:
        found, problems = read_split(config(str(path), "data.on_error=skip"), "train")
    except ConfigError as error:  # the one reason to stop: there is no row
        assert "holds no rows" in str(error)
        found, problems = [], []
    if kind == ".jsonl" and not content.lstrip().startswith(b"["):
        assert len(found) + len(problems) == sum(
            bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        )
    if not junk and not cut and kind in (".json", ".jsonl"):
        assert len(found) + len(problems) == len(rows)
    for c in found:
        assert c.dialogue.strip() and c.note.strip()
    for r in rows:
        secret, ids = r.get("dialogue"), [str(x.get("id")) for x in rows]  # ids may be named
        if isinstance(secret, str) and len(secret) > 7 and not any(secret in i for i in ids):
            assert not any(secret in p for p in problems)


def test_ids_have_up_to_100_characters_and_whole_numbers_no_fraction(tmp_path):
    rows = [ROWS[0] | {"id": "x" * 100}, ROWS[1] | {"id": 7.0}, ROWS[2] | {"id": 1.5}]
    assert [c.id for c in read_split(config(write(tmp_path, "jsonl", rows)), "train")[0]] == [
        "x" * 100,
        "7",
        "1.5",
    ]


def test_a_chat_without_an_answer_has_nothing_to_learn(tmp_path):
    asked = {"role": "user", "content": SECRET}
    path = write(tmp_path, "jsonl", [{"messages": [asked]}])
    with pytest.raises(ConfigError, match="no assistant's turn") as caught:
        read_split(config(path, "data.columns={messages: messages}"), "train")
    assert SECRET not in str(caught.value)
