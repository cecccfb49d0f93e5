"""The task as configuration: its prompt, a request out of each row's columns, its headings."""

import json

import pytest

from loop.commands.generate import build_parser, read_input
from loop.config.cli import load_config
from loop.config.schema import SYSTEM, ConfigError, TaskConfig
from loop.data.conversations import read_split
from loop.data.soap import SOAP, has_all_sections, parse_note, soap_messages
from loop.generation.notes_file import read_questions
from loop.generation.prompt import prompt_texts

REQUEST = "task.request=Write {section} for {who}."
ROWS = [
    {"id": 1, "dialogue": "Doctor: a", "soap": "Asthma.", "header": "PMH", "who": "a child"},
    {"id": 2, "dialogue": "Doctor: {who}", "soap": "None.", "header": "{who}", "who": 7},
]


@pytest.fixture
def source(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def load(source: str, *words: str):
    base = ["--config", "loop/configs/soap_qlora.yaml", f"data.train={source}", "data.valid=null"]
    return load_config([*base, "data.test=null", "data.on_error=stop", *words])


def columns(**others: str) -> str:
    names = {"dialogue": "dialogue", "note": "soap"} | others
    return f"data.columns={json.dumps(names)}"


def test_a_request_is_filled_from_each_row(source):
    words = [REQUEST, "task.system=''", columns(section="header"), "data.valid_fraction=0"]
    found = read_split(load(source, *words), "train")[0]
    asked = [[(m["role"], m["content"]) for m in c.messages] for c in found]
    assert asked == [
        [("user", "Write PMH for a child.\n\nDoctor: a"), ("assistant", "Asthma.")],
        # What a row says in braces is text.
        [("user", "Write {who} for 7.\n\nDoctor: {who}"), ("assistant", "None.")],
    ]
    with pytest.raises(ConfigError, match=r"row 1 \(id 1\): no column 'section', only id, dialog"):
        read_split(load(source, REQUEST, columns()), "train")


def test_generate_asks_what_the_training_asked(source):
    config = load(source, REQUEST, columns(section="header"))
    trained = {"prompt": prompt_texts(config.task)}
    args = build_parser().parse_args(
        ["--adapter", "A", "--input", source, "--output", "o.jsonl"]
        + ["data.columns={dialogue: dialogue, section: header}"]
    )
    dialogues, request = read_input(args, None, trained)
    assert request.task == config.task
    for c in read_split(config, "train")[0] + read_split(config, "valid")[0]:
        assert (
            soap_messages(dialogues[c.id], None, request.task, request.fields[c.id])
            == (c.messages[:-1])
        )
    assert request.as_text("1") != request.as_text("2")  # two requests on one dialogue

    def of_one(*options: str):
        return read_input(build_parser().parse_args(["--adapter", "A", *options]), "hi", trained)

    _, request = of_one("--field", "section=PMH", "--field", "who= a = b ")
    assert request.fields == {"-": {"section": "PMH", "who": "a = b"}}
    for options, words in (
        ([], "--field section=VALUE: the request of --adapter A has {section}"),
        (["--field", "section=x"], "--field who=VALUE"),
        (["--field", "part=x"], "--field part: write NAME=VALUE; the request's NAMEs are: section"),
        (["--field", "section="], "--field section: write NAME=VALUE"),
    ):
        with pytest.raises(ConfigError) as error:
            of_one(*options)
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"--input .*, row 1 \(id 1\): no column 'section'"):
        read_questions(source, None, {"section"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.request=Write {note}."], "{note} is filled from no column"),
        (["task.system=For {who}."], "a {NAME} is filled in the request alone"),
        (["task.headings={}"], "asks for S:, O:, A: and P:; give one that fits"),
        (["task.request=x", "task.headings={'A:': b}"], "must be a text on one line, without the"),
        (["task.request=x", 'task.headings=["A\\nB"]'], "must be a text on one line, without the"),
        (["task.request=x", "task.headings={A: x, B: [y, x]}"], "'x' is named twice"),
        (
            ["task.request=x", "task.headings={A: x, B: [y, X]}"],
            "'X' of B differs from one of A in",
        ),
        (
            ["task.request=x", "task.headings=[PLAN, Plan]"],
            "'Plan' of Plan differs from one of PLAN",
        ),
        (["task.request=Write { part }."], "{ part } stands for no column; write {part}, without"),
        (["task.request=Write {part:>10}."], "{part:>10} stands for no column; write {part}"),
        (["task.request=Write {part!r}."], "{part!r} stands for no column; write {part}"),
        (["task.request=Write {{ part }}."], "{{ part }} stands for no column; write {part}"),
        (["task.request=Write ${part}."], "${part} stands for no column; write {part}"),
        (["data.columns.section=header"], "data.columns.section: is none of"),
        (["task.request=x", "task.headings={}", "data.headings=required"], "names none"),
        (["task.request=x", "task.headings={}", "data.normalize_headings=true"], "names none"),
        (["task.request=x", "task.headings={}", "generation.forced_headings=true"], "names none"),
    ],
)
def test_a_task_that_can_not_be_is_one_line(source, words, said):
    with pytest.raises(ConfigError) as error:
        load(source, *words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_left_out_is_the_soap_tasks():
    assert TaskConfig() == SOAP and SOAP.system == SYSTEM
    task = TaskConfig(request="  Schreibe den Bericht.\n", headings=["Befund", "Plan"])
    assert task.system == SYSTEM and task.request == "Schreibe den Bericht.\n\n"
    assert TaskConfig(**task.model_dump()) == task  # as config.yaml has it
    note = "Befund: RR 120/80\nP: 80\nPlan: Ruhe"
    assert parse_note(note, task) == {"Befund": "RR 120/80\nP: 80", "Plan": "Ruhe"}
    assert has_all_sections(note, task) and not has_all_sections(note)


def test_headings_as_other_languages_write_them():
    """French puts a narrow blank before a colon, and Arabic may begin with a mark of direction."""
    task = TaskConfig(request="x", headings=["Évaluation", "الخطة"])
    for blank, mark in (("\u00a0", "\u200f"), ("\u202f", "\u200e"), (" ", "")):
        note = f"Évaluation{blank}: a\n{mark}الخطة: b"
        assert parse_note(note, task) == {"Évaluation": "a", "الخطة": "b"}
    two_characters = "E\u0301valuation: a\nالخطة: b"  # as macOS writes an accent
    assert parse_note(two_characters, task) == {"Évaluation": "a", "الخطة": "b"}


def test_a_number_that_is_none_does_not_stand_in_a_request(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"dialogue": "a", "soap": "b", "section": NaN, "who": 1}\n')
    with pytest.raises(ConfigError, match="section is float, not a text"):
        read_split(load(str(path), REQUEST, columns()), "train")


def test_several_spellings_are_one_section():
    """As ACI-Bench's divisions have them; in capitals a heading may have its line for itself."""
    task = load_config(["--config", "loop/configs/aci_bench.yaml"]).task
    note = "CC: a\nHPI\n\nb\nPHYSICAL EXAM\nc\nRESULTS:\nd\nIMPRESSION\ne\nPLAN\nf\nthe plan\ng"
    assert parse_note(note, task) == {
        "Subjective": "a\nb",
        "Exam": "c",
        "Results": "d",
        "Assessment and plan": "e\nf\nthe plan\ng",
    }
