"""What strangers' files look like: each is read, or refused in one line that helps."""

import bz2
import gzip
import io
import json
import lzma
import sys

import datasets
import pyarrow.parquet
import pytest

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.conversations import read_split
from loop.data.sources import locations
from loop.data.sources.locations import hub_id, locate
from loop.generation.decode import Note
from loop.generation.notes_file import NotesFile, read_predictions, read_questions

ROWS = [
    {"id": f"r{i}", "dialogue": f"Doctor: {i}?\nPatient: pain; bad", "soap": f"S: {i}"}
    for i in range(3)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test here may ask the hub for anything."""

    def refuse(name, *args, **kwargs):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def read(source, *args):
    options = [f"data.train={json.dumps(str(source))}", "data.valid=null", "data.test=null"]
    options += ["data.valid_fraction=0", "data.on_error=stop", *args]
    config = load_config(["--config", "loop/configs/soap_qlora.yaml", *options])
    return read_split(config, "train")[0]


def table(separator: str, before: str = "") -> str:
    lines = [before] if before else []
    for row in [list(ROWS[0]), *(row.values() for row in ROWS)]:
        lines.append(separator.join(f'"{cell}"' for cell in row))
    return "\r\n".join(lines) + "\r\n"


def parquet(soap: bool = False, when: pyarrow.Array | None = None) -> bytes:
    """soap: once more; when: a further column."""
    out = io.BytesIO()
    rows = pyarrow.Table.from_pylist(ROWS)
    if soap:
        rows = rows.append_column("soap", rows["soap"])
    if when is not None:
        rows = rows.append_column("when", when)
    pyarrow.parquet.write_table(rows, out)
    return out.getvalue()


FILES = {
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.jsonl.BZ2": bz2.compress(JSONL),
    "a.ndjson.xz": lzma.compress(JSONL),
    "a.jsonl": b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n"),
    "A.JSON": b"\n" + json.dumps(ROWS).encode(),
    "A.CSV": table(",").encode("utf-8-sig"),
    "semicolon.csv": table(";").encode(),
    "tab.csv": table("\t").encode(),
    "bars.csv": table("|").encode(),
    "blanks.csv": table(",").replace('"dialogue"', " dialogue ").encode(),
    "sep.csv": table(";", "sep=;").encode("utf-16"),
    "a.tsv.gz": gzip.compress(table("\t").encode("utf-16")),
    # A column more, whose name has more commas than the header has separators.
    "commas.tsv": table("\t").replace('"\r\n', '"\ta,b,c,d,e\r\n').encode(),
    "quoted_commas.csv": table(";").replace('"\r\n', '";"a,b,c,d,e"\r\n').encode(),
    "blank_first.csv": ("\r\n \r\n" + table(";")).encode(),
    "SEP.csv": table(";", "SEP=;").encode(),
    "emptied.csv": (table(",") + ",,\r\n" + ",,\r\n").encode(),
    "unnamed.csv": table(",").replace('"soap"', '"soap",,').replace('"\r\n', '",,\r\n').encode(),
    "surplus.csv": table(",").replace('"\r\n', '",,\r\n').replace('"soap",,', '"soap"').encode(),
    "mac.csv": table(",").replace("\r\n", "\r").encode(),
    "a.parquet": parquet(),
    "a.parquet.gz": gzip.compress(parquet()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_hold_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    found = read(tmp_path / name)
    assert [(c.id, c.dialogue, c.note) for c in found] == [tuple(r.values()) for r in ROWS]
    # generate reads the same dialogues under the same ids.
    asked = read_questions(str(tmp_path / name))
    assert {key: q.dialogue for key, q in asked.items()} == {c.id: c.dialogue for c in found}


def test_a_workbook_is_read_or_names_its_package(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    header = ["by", *ROWS[0]]
    for cells in [header, [None, 7, "Doctor: hi", "S: x"], ["me", 8.0, "Doctor: ho", "S: y"]]:
        book.active.append(cells)  # an empty cell is no missing one
    book.save(tmp_path / "a.xlsx")
    assert [c.id for c in read(tmp_path / "a.xlsx")] == ["7", "8"]
    (tmp_path / "~$a.xlsx").write_bytes(b"an open workbook's")
    assert [c.id for c in read(tmp_path / "*.xlsx")] == ["7", "8"]
    sheet = book.create_sheet("B")
    for cells in [
        [*ROWS[0], None],
        [1, "a_x000D_\nb", "S: x"],
        [None],
        [2, "Doctor: ho", "S: y", None],
    ]:
        sheet.append(cells)
    book.move_sheet(sheet, -1)
    book.save(tmp_path / "b.xlsx")
    assert [(c.id, c.dialogue) for c in read(tmp_path / "b.xlsx")] == [
        ("1", "a\nb"),
        ("2", "Doctor: ho"),
    ]
    book.create_sheet("cover", 0).append(["a report"])
    book.save(tmp_path / "c.xlsx")
    with pytest.raises(ConfigError, match="the first sheet has none"):
        read(tmp_path / "c.xlsx")


def test_what_is_hidden_in_a_workbook_is_said(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in ([*ROWS[0]], [1, "a", "S: a"], [2, "b", "S: b"], [], [3, "c", "S: c"]):
        book.active.append(cells)
    book.active.row_dimensions[3].hidden = True
    book.active.column_dimensions["B"].hidden = True  # data.columns names it, so it is read
    book.create_sheet("H", 0).sheet_state = "hidden"
    book.create_chartsheet("C", 0).add_chart(openpyxl.chart.BarChart())
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(ConfigError, match=r"row 2: is hidden in the workbook \(line 3\): show"):
        read(tmp_path / "a.xlsx")
    assert [c.dialogue for c in read(tmp_path / "a.xlsx", "data.on_error=skip")] == ["a", "c"]
    book["Sheet"].sheet_state = "hidden"
    book.create_sheet("V").append(["a note of the ward"])
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(ConfigError, match="b.xlsx.*(holds no rows|has none)"):
        read(tmp_path / "b.xlsx")


def test_a_workbook_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"/a.xlsx: Excel .*as CSV, or .* openpyxl$"):
        read(tmp_path / "a.xlsx")


def row(**changes) -> bytes:
    return json.dumps(ROWS[0] | changes).encode()


REFUSED = {
    "empty.jsonl": (b"", "holds no rows"),
    "empty.json": (b"[]", "holds no rows"),
    "header.csv": (b"id,dialogue,soap\n", "holds no rows"),
    "cut.jsonl.gz": (gzip.compress(JSONL)[:-9], "cannot be decompressed"),
    "not.csv.gz": (b"id,dialogue,soap\n", "cannot be decompressed"),
    "cut.parquet.gz": (gzip.compress(parquet())[:-9], "cannot be decompressed"),
    "twice.csv": (b"dialogue,soap,soap\na,b,c\n", "a column twice"),
    "twice.jsonl": (b'{"soap": "a", "soap": "b"}', "a key twice"),
    "blank.jsonl": (row(id="a b"), "has blanks"),
    "no_id.jsonl": (row(id=""), "is empty"),
    "bool.jsonl": (row(id=True), "must be a number"),
    "zero.jsonl": (row(dialogue="\u200b\ufeff\u2060 \u3164"), "row 1 (id r0): dialogue is empty"),
    "double.jsonl": (row() + b"\n" + row(), "occurs twice"),
    "utf16_no_mark.csv": (table(";").encode("utf-16-le"), "NULs, save it as UTF-8"),
    "utf16_no_mark.jsonl": (JSONL.decode().encode("utf-16-le"), "NULs, save it as UTF-8"),
    "packed.jsonl": (gzip.compress(JSONL), "compressed: put .gz behind its name"),
    "workbook.csv": (b"PK\x03\x04", "name it .xlsx"),
    "latin.csv": (b"id,dialogue,soap\nM\xfcller,a,b\n", "its id is not UTF-8"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd" + b"x" * 99, "compressed by zstd: unpack it"),
    "escaped.jsonl": (row(dialogue="Doctor: a\\nPatient: b"), "(id r0): dialogue has line breaks"),
    "null.csv": (b"id,dialogue,soap\n1,Doctor: a,NULL\n", "note is NULL, a word for nothing"),
    "failed.csv": (b"id,dialogue,soap\n1,Doctor: a,#REF!\n", "note is #REF!, a word for nothing"),
    "joined.csv": (b"id,dialogue,soap\n1,a,b\nid,dialogue,soap\n", "row 2: repeats the header"),
    "sqlcmd.csv": (b"id,dialogue,soap\n--,---,---\n1,a,b\n", "row 1: is a line of dashes"),
    "title.csv": (b"# May\nid,dialogue,soap\n", "remove what stands before the line that names"),
    "footer.csv": (b"id,dialogue,soap\n1,a,b\n(1 row)\n", "row 2: has another number of fields"),
    "caret.csv": (b"id^dialogue^soap\n1^a^b\n", "or bars between columns?"),
    "endless.jsonl": (b'{"id": 1e400, "dialogue": "a", "soap": "b"}', "must be a number"),
    "by_column.json": (json.dumps({"id": [1], "dialogue": ["a"]}).encode(), "a row a line (pandas"),
    "wrapped.json": (json.dumps({"data": ROWS}).encode(), "the rows seem to be inside of it"),
    "turns.jsonl": (row(dialogue=["Doctor: a"]), "is list, not a text: join its parts"),
    "pretty.json": (json.dumps(ROWS[0], indent=1).encode(), "one object a line"),
    "damaged.jsonl.bz2": (b"BZh9" + b"x" * 99, "cannot be read (OSError); copy it again"),
    "twice.parquet": (parquet(soap=True), "names a column twice"),
    "date.parquet": (parquet(when=pyarrow.array([10**8] * 3, pyarrow.date32())), "row 1: has a d"),
    "notes.docx": (b"PK", "the kinds of files that are read: .jsonl"),
    "NAME": (b"x", "the kinds of files that are read: .jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_what_would_help(name, tmp_path):
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    assert words in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"SQLite format 3\0" + b"\0" * 80, "a database: export its table as CSV"),
        ("a.jsonl", b"%PDF-1.4\n1 0 obj", "a PDF"),
        ("b.csv", b"{\\rtf1 a}", "in RTF"),
        ("c.csv", b"<!DOCTYPE html>\n<html>", "a web page"),
        ("b.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("c.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("d.csv", table(",").encode("utf-32"), "in UTF-32: save it as UTF-8"),
        ("d.jsonl", JSONL.decode().encode("utf-32"), "in UTF-32: save it as UTF-8"),
        ("e.csv", table(",").replace("Doctor", "Doc\0tor").encode(), "holds the sign NUL"),
        ("e.jsonl", row(dialogue='[{"speaker": "d", "text": "a"}]'), "a list written as a text"),
        ("f.jsonl", row(dialogue="[{'speaker': 'd', 'text': 'a'}]"), "a list written as a text"),
        ("g.jsonl", row(dialogue='["Doctor: a", "Patient: b"]'), "a list written as a text"),
    ],
)
def test_files_of_another_kind_than_their_name_are_said(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / name)
    assert said in str(error.value) and f"{name}, row 1" in str(error.value)


def test_brackets_around_a_speaker_are_no_list(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(row(dialogue="[Doctor] a\n[Patient] [b]"))
    assert len(read(tmp_path / "a.jsonl")) == 1


def test_what_clinicians_write_for_nothing_is_a_note(tmp_path):
    notes = ["None", "N/A", "-", "Null findings.", "Sees C:\\new folder: no"]
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join(row(id=i, soap=note) for i, note in enumerate(notes))
    )
    assert [c.note for c in read(tmp_path / "a.jsonl")] == notes


def test_an_id_in_capitals_and_columns_inside_of_objects(tmp_path):
    (tmp_path / "a.csv").write_text("ID,dialogue,soap\n7,Doctor: a,S: a\n")
    assert [c.id for c in read(tmp_path / "a.csv")] == ["7"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"visit": {"talk": "a"}, "note": "b", "c": 1}))
    columns = "data.columns={dialogue: visit.talk, note: note}"
    assert read(tmp_path / "a.jsonl", columns)[0].dialogue == "a"
    with pytest.raises(ConfigError, match="no column 'd.c', only visit, note, c: map it"):
        read(tmp_path / "a.jsonl", "data.columns={dialogue: d.c, note: note}")


def test_ids_may_be_fractions(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(row(id=0.5) + b"\n" + row(id=2.0))
    assert [c.id for c in read(tmp_path / "a.jsonl")] == ["0.5", "2"]


@pytest.mark.parametrize(
    "source",
    ["patients/NAME.txt", "NAME.jsonl.gz", "a/b/NAME", "/NAME", "NAME", "a/NAME:notes.jsonl"]
    + ["patients/NAME.DOCX", "patients/NAME.tar.zst", "patients/.NAME", "patients/NAME.jsonl:train"]
    + ["tests/NAME", "a/NAME@x.csv", "../NAME", "~/NAME", "a/my notes", "a\\NAME"],
)
def test_a_path_never_leaves_the_machine(source):
    assert hub_id(source) is None
    with pytest.raises(ConfigError, match="not asked of the hub"):
        read(source)


def test_the_parts_of_a_hub_id():
    assert locate("owner/corpus-v1.5.train:dev", "valid")[1] == "owner/corpus-v1.5.train"
    at = locate("owner/name@v1.0:sub.set:train[:10%]", "valid")
    assert at == (None, "owner/name", "v1.0", "sub.set", "train[:10%]")
    assert locate("owner/name:dev", "valid")[1:] == ("owner/name", None, None, "dev")
    assert locate("owner/name:sub:", "valid")[3:] == ("sub", "validation")


def test_the_hub_is_asked_for_the_revision_that_is_named(monkeypatch):
    asked = []

    def load(name, subset, **options):
        asked.append((name, subset, options["split"], options["revision"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("owner/pinned@v1.0:sub:dev", "owner/newest"):
        assert len(read(source)) == 3
    assert asked == [
        ("owner/pinned", "sub", "dev", "v1.0"),
        ("owner/newest", None, "train", "main"),
    ]


def test_folders_and_patterns(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "many")
    assert len(read(tmp_path / "one")) == len(read(tmp_path / "many")) == 3
    assert [c.id for c in read(f"{tmp_path}/many:dev")] == ["r1"]
    with pytest.raises(ConfigError, match="has the splits train, dev"):
        read(f"{tmp_path}/many:test")
    rows.save_to_disk(tmp_path / "saved" / "one")
    (tmp_path / "texts").mkdir()
    for name in ("a_dialogue.txt", "a_note.txt"):
        (tmp_path / "texts" / name).write_text("Doctor: a\n")
    visits = tmp_path / "visits" / "may"
    visits.mkdir(parents=True)
    (visits / "n.dialogue.txt").write_bytes(b"\xef\xbb\xbfDoctor: a\r\nPatient: b")
    (visits / "n.note.txt").write_bytes("S: x\r\nO: y".encode("utf-16"))
    (found,) = read(tmp_path / "visits")
    assert (found.id, found.dialogue, found.note) == (
        "may/n",
        "Doctor: a\nPatient: b",
        "S: x\nO: y",
    )
    for i in (1, 2):
        (tmp_path / f"part{i}.jsonl").write_bytes(row(id=f"p{i}"))
    assert [c.id for c in read(tmp_path / "part*.jsonl")] == ["p1", "p2"]
    assert [c.id for c in read(tmp_path / "part[2].jsonl")] == ["p2"]
    with pytest.raises(ConfigError, match="its folders are of save_to_disk: name one of them"):
        read(tmp_path / "saved")
    with pytest.raises(ConfigError, match="holds 2 .txt; expected NAME.dialogue.txt with NAME.no"):
        read(tmp_path / "texts")
    with pytest.raises(ConfigError, match="no file matches"):
        read(tmp_path / "none*.jsonl")


def test_ids_of_a_folder_of_tables_stay_as_they_are_written(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.csv"
    path.write_text("id;dialogue;soap\n007;Doctor: a;S: NA\n7;Doctor: b;S: b\n2026-01-01;c;d\n")
    assert [c.id for c in read(tmp_path)] == ["007", "7", "2026-01-01"]
    path.write_text("id,dialogue,soap\n1,a,b\n2,a\n")
    locations._load_dataset.cache_clear()
    with pytest.raises(ConfigError, match="row 2: has another number of fields"):
        read(tmp_path)


def test_an_address_and_the_home_folder(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="s3://b/a.jsonl: is an address, and only files of this"):
        read("s3://b/a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    assert len(read("~/a.jsonl")) == len(read("~/*.jsonl")) == 3
    (tmp_path / "n.dialogue.txt").write_text("Doctor: a")
    (tmp_path / "n.note.txt").write_text("S: a")
    (tmp_path / "._n.dialogue.txt").write_bytes(b"\0\5\x16\7")  # as macOS leaves it on a stick
    assert [c.id for c in read("~/")] == ["n"]


def test_chats_of_openais_fine_tuning(tmp_path):
    ask, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}

    def chat(*messages):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
        return read(tmp_path / "a.jsonl", "data.columns={messages: messages}")[0].messages

    parts = {"role": "user", "content": [{"type": "text", "text": "u"}]}
    assert chat(parts, answer | {"weight": 1}) == [ask, answer]
    for messages, words in (
        ((ask, answer | {"weight": 0}, ask, answer), "an answer has the weight 0"),
        ((ask, answer | {"tool_calls": [{}]}, ask, answer), "has tool_calls, which are not tr"),
        (({"role": "system", "content": ""}, ask, answer), r"message 1 \(system\) is empty"),
    ):
        with pytest.raises(ConfigError, match=words):
            chat(*messages)


def test_chats_of_sharegpt_and_those_that_begin_with_the_answer(tmp_path):
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    columns = "data.columns={conversations: conversations}"
    assert [m["role"] for m in read(tmp_path / "a.jsonl", columns)[0].messages] == [
        "user",
        "assistant",
    ]
    turns[0]["from"], turns[1]["from"] = "User", "Model"
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": turns}))
    assert read(tmp_path / "c.jsonl", columns)[0].messages[1]["role"] == "assistant"
    for wrong in (["gpt"], {}, None, "somebody"):
        (tmp_path / "c.jsonl").write_text(
            json.dumps({"conversations": [{"from": wrong, "value": "u"}]})
        )
        with pytest.raises(ConfigError, match="must be a list of from"):
            read(tmp_path / "c.jsonl", columns)
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "x", "conversations": turns[1:]}))
    with pytest.raises(ConfigError, match=r"row 1 \(id x\): .* begins with the assistant's turn"):
        read(tmp_path / "b.jsonl", columns)


def test_what_stands_beside_a_chat_is_no_silence(tmp_path):
    ask, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    sharegpt = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "a.jsonl"

    def chat(**row):
        path.write_text(json.dumps(row))
        column = next(name for name in ("messages", "conversations") if name in row)
        return read(path, f"data.columns={{{column}: {column}}}")[0].messages

    first = {"role": "system", "content": "Be short."}
    assert chat(conversations=sharegpt, system="Be short.")[0] == first
    assert chat(conversations=sharegpt, system="", tools="[]") == [ask, answer]
    assert chat(messages=[first, ask, answer], system="Be short.", tools=None)[0] == first
    assert chat(messages=[ask, answer], system="Be short.")[0] == first
    others = [
        ("developer", "Be short."),
        ("Human", "u"),
        ("ai", "a"),
        ("USER", "u"),
        ("model", "a"),
    ]
    others = [{"role": role, "content": content} for role, content in others]
    assert chat(messages=others) == [first, ask, answer, ask, answer]
    tool = {"role": "tool", "content": "t"}
    assert [m["role"] for m in chat(messages=[ask, answer, tool, answer])][2] == "tool"
    for row, words in (
        ({"messages": [first, ask, answer], "system": "Be long."}, "system's turn differ"),
        ({"messages": [ask, answer], "tools": [{"type": "function"}]}, "has tools, which no"),
        ({"conversations": sharegpt, "tools": '[{"name": "f"}]'}, "has tools, which no"),
        ({"messages": [ask, answer], "system": 3}, "system is int, not a text"),
        ({"messages": [ask, tool, answer]}, "a tool's turn that no assistant's turn asked for"),
        ({"messages": [ask, answer | {"function_call": {"a": 1}}]}, "has function_call"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            chat(**row)
        assert "Be " not in str(error.value)


def test_generate_gives_the_ids_that_evaluate_wants(tmp_path):
    (tmp_path / "a.csv").write_text("talk\nDoctor: a\nDoctor: b\n")
    columns = {"dialogue": "talk"}
    assert list(read_questions(str(tmp_path / "a.csv"), columns)) == ["test-0", "test-1"]
    with pytest.raises(ConfigError, match=r"--input .*a.csv, row 1.*: no column 'dialogue'"):
        read_questions(str(tmp_path / "a.csv"))


def test_what_generate_writes_can_be_scored(tmp_path):
    (tmp_path / "a.csv").write_text("id,talk,soap\n7,Doctor: a,S: a\n8.0,Doctor: b,S: b\n")
    (tmp_path / "b.csv").write_text("talk,soap\nDoctor: a,S: a\nDoctor: b,S: b\n")
    for name in ("a.csv", "b.csv"):
        asked = read_questions(str(tmp_path / name), {"dialogue": "talk"})
        notes = NotesFile(
            str(tmp_path / f"{name}.out"), {key: q.dialogue for key, q in asked.items()}, {}
        )
        for key in asked:
            notes.add(key, Note(f"S: {key}", True), 0)
        notes.close()
        options = [f"data.test={tmp_path / name}", "data.columns={dialogue: talk, note: soap}"]
        config = load_config(["--config", "loop/configs/soap_qlora.yaml", *options])
        ids = [c.id for c in read_split(config, "test")[0]]
        found = read_predictions(str(tmp_path / f"{name}.out"), ids)
        assert {key: found[key].text for key in ids} == {key: f"S: {key}" for key in ids}
    (tmp_path / "numbers.jsonl").write_text('{"id": 7, "note": "x"}\n{"id": 8.0, "note": "y"}\n')
    assert [*read_predictions(str(tmp_path / "numbers.jsonl"), ["7", "8"])] == ["7", "8"]
