"""The SOAP prompt and taking a note apart."""

import pytest

from loop.data.soap import (
    SOAP,
    before_next_heading,
    fit_dialogue,
    has_all_sections,
    normalize_headings,
    parse_note,
    shorten,
    soap_messages,
)

NOTE = (
    "S: Cough for 3 days.\nO: Temperature 38.4 C.\nA: Bronchitis.\n"
    "P: Rest: a week.\nSee again in 7 days."
)


def test_a_note_is_taken_apart_at_its_headings():
    assert parse_note(NOTE) == {
        "S": "Cough for 3 days.",
        "O": "Temperature 38.4 C.",
        "A": "Bronchitis.",
        "P": "Rest: a week.\nSee again in 7 days.",
    }
    assert has_all_sections(NOTE)


@pytest.mark.parametrize(
    "note",
    [
        "**Subjective:** a\n**Objective:** b\n**Assessment:** c\n**Plan:** d",
        "# S: a\n# O: b\n# A: c\n# P: d",
        "S\uff1aa\nO\uff1a b\nA \uff1ac\n**P\uff1a** d",  # the wide colon
    ],
)
def test_markdown_headings_are_found(note):
    assert parse_note(note) == {"S": "a", "O": "b", "A": "c", "P": "d"}


@pytest.mark.parametrize(
    "note",
    [
        "",
        "Cough.",
        NOTE.replace("O:", "X:"),
        NOTE.replace("Bronchitis.", ""),
        "O: b\nS: a\nA: c\nP: d",
    ],
)
def test_a_missing_empty_or_misplaced_section_counts(note):
    assert not has_all_sections(note)


def test_a_heading_twice_keeps_both_texts():
    assert parse_note("S: a\nO: b\nS: c")["S"] == "a\nc"


def test_training_and_generation_share_the_prompt():
    prompt, whole = soap_messages(" Doctor: hi "), soap_messages("Doctor: hi", " S: a ")
    assert whole[:2] == prompt
    assert prompt[1]["content"] == SOAP.request + "Doctor: hi"
    assert whole[2] == {"role": "assistant", "content": "S: a"}
    short = soap_messages("Doctor: hi", task=SOAP.model_copy(update={"system": "Be short."}))
    assert short == [{"role": "system", "content": "Be short."}, prompt[1]]


def test_a_dialogue_loses_as_few_turns_as_make_it_fit():
    dialogue = "\n".join(f"turn {i}" for i in range(9))
    assert fit_dialogue(dialogue, len, len(dialogue)) == (dialogue, 0)
    for limit in range(30, len(dialogue)):
        found = fit_dialogue(dialogue, len, limit)
        if found:
            text, turns = found
            assert len(text) <= limit and text == shorten(dialogue, turns) and turns > 0
            assert len(shorten(dialogue, turns - 1)) > limit
    assert fit_dialogue(dialogue, len, 20) is None


def test_the_turns_that_are_left_out_are_those_of_the_middle():
    turns = [f"turn {i}" for i in range(7)]
    for count, start in ((1, 3), (2, 3), (3, 2), (5, 1)):
        shorter = [*turns[:start], f"[{count} turns left out]", *turns[start + count :]]
        assert shorten("\n".join(turns), count) == "\n".join(shorter)


def test_a_section_ends_where_a_line_begins_another():
    assert before_next_heading(" Cough.\nMore: yes.\nObjective: x") == " Cough.\nMore: yes.\n"
    assert before_next_heading(" Plan: rest, BP: 120/80") == " Plan: rest, BP: 120/80"
    assert before_next_heading("\nP: x") == "\n"


@pytest.mark.parametrize(
    ("note", "changed"),
    [
        ("Subjective: a\nObjective: b\nAssessment: c\nPlan: d", 4),
        ("SUBJECTIVE:\na\nOBJECTIVE:\nb\nASSESSMENT:\nc\nPLAN:\nd", 4),
        ("**S:** a\n**O:** b\n**A:** c\n**P:** d", 4),
        ("## Subjective\na\n## Objective\nb\n## Assessment\nc\n## Plan\nd", 4),
        ("S - a\nO - b\nA - c\nP - d", 4),
        ("1. Subjective: a\n2. Objective: b\n3. Assessment: c\n4. Plan: d", 4),
        ("S: a\nO: b\nA/P: c\nPlan: d", 2),
        ("S: a\nO: b\nAssessment and Plan:\nc\nP: d", 1),
        ("Subjective\uff1aa\nObjective\uff1ab\nAssessment\uff1ac\nPlan\uff1ad", 4),
        ("Subjective \u2014 a\nObjective \u2013 b\nAssessment -> c\nPlan = d", 4),
        ("Subjective:: a\nObjective) b\nAssessment. c\nPlan \u2192 d", 4),
        ("<b>Subjective:</b> a\n<strong>O</strong>: b\n<h2>Assessment</h2>\nc\nPlan:<br> d", 4),
        ("[S] a\n(O) b\n`A` c\n**P** d", 4),
        ("I. Subjective: a\n(2) Objective: b\nc) Assessment: c\n10. **Plan**: d", 4),
        ("\u2022 Subjective: a\n- Objective: b\n* A: c\n- P: d", 4),
        ("S: a\n\u00a0O: b\n\u200bA: c\n\ufeffP: d", 3),
        ("### Subjective ###\na\n### Objective ###\nb\n# Assessment\nc\n# Plan\nd", 4),
        ("Subjective (S): a\nO (Objective): b\nA: c\nP: d", 2),
        ("S: a\nO: b\nImpression & Plan: c\nP: d", 1),
        ("**S**ubjective: a\n(O)bjective: b\n[A]ssessment: c\n__P__lan: d", 4),
        ("S: Subjective\na\nO - Objective: b\nA: **Assessment:** c\nP: Plan: d", 4),
        ("Subjective\n====\na\nObjective\n----\nb\nAssessment\n~~~\nc\nPlan\n---\nd", 4),
        ("== Subjective ==\na\n--- Objective ---\nb\n'''A''': c\n=== PLAN ===\nd", 4),
        ("S: a O: b A: c P: d", 4),
        ("**S:** a; **O:** b; **A:** c; **P:** d", 4),
        ("<b>Subjective:</b> a<br><b>Objective:</b> b<br>Assessment: c | Plan: d", 4),
        ("\u200eS: a\n\u200fO: b\nA: c\nP: d", 2),
        ("S: a\nO: b\nA: c\nP: d", 0),
        ("| S | a |\n| Objective | b |\n| **A:** | c |\n| PLAN | d |", 4),
        ("\U0001f5e3\ufe0f Subjective: a\n\U0001fa7a **Objective**: b\n\u2705 A: c\nP: d", 3),
        ('{"Subjective": "a", "o": "b", "ASSESSMENT": "c", "plan": "d"}', 4),
        ("<Subjective>a</Subjective>\n<O> b </O>\n<assessment>\nc\n</assessment><P>d</P>", 4),
        ("<note><S>a</S><O>b</O><A>c</A><P>d</P></note>", 4),
    ],
)
def test_headings_of_any_style_are_normalized_and_counted(note, changed):
    written, count = normalize_headings(note)
    assert count == changed
    assert parse_note(written) == {"S": "a", "O": "b", "A": "c", "P": "d"}


@pytest.mark.parametrize(
    "line",
    ["A) mild", "A. fib", "P = 80", "P -> home", "Plan of care", "plan - as before", "Plan (B): x"]
    + ["P: ~80", "P: 70-80", "P: 64 (regular)", "P: 80 per minute", "- P: 80", "S/O of a nurse"]
    + ["| Plan of care | x |", '{"P": 80}', "<Plan>x", "\u2705 Planned", "| P: 80 | x |"]
    + ["Assessment was done", "Object\u0131ve: x", "\u017f - x", "- A: not the next"],
)
def test_what_only_looks_like_a_heading_stays_where_it_is(line):
    before = "S: a\nO: b" if line[0] == "A" else "S: a\nO: b\nA: c"
    if line.startswith("- A"):
        before = "S: a"
    written, count = normalize_headings(f"{before}\n{line}")
    assert (written, count) == (f"{before}\n{line}", 0)


@pytest.mark.parametrize(
    "note",
    ["S: a O: T 37 P: 80 A: c P: d", "S: a\nO: T 37\n**P:** 80\nA: c\nP: d", "S: P: A: O: x"]
    + ["**S**omething hurts", "S: a A: c O: b P: d", "--- Planning ---", "S: Subjectively well"],
)
def test_only_what_is_sure_is_changed(note):
    """A pulse among the findings of one line, or in bold; headings in another order."""
    written, count = normalize_headings(note)
    assert (written, count) == (
        ("S: a\nO: T 37 P: 80\nA: c\nP: d", 4) if note.startswith("S: a O") else (note, 0)
    )
    if "**P:**" in note:
        assert parse_note(note)["P"] == "d"


@pytest.mark.parametrize(
    "listed",
    [
        "O: 3 days ago\nP: walking\nQ: dull\nR: none\nS: 7/10\nT: constant",
        "**P:** walking\n**Q:** dull\n**R:** none\n**S:** 7/10\n**T:** constant",
        "S - cough\nA - penicillin\nM - none\nP - asthma\nL - noon\nE - none",
        "- O: 1 day\n- L: knee\n- D: hours\n- C: dull\n- A: none\n- R: none\n- T: am\n- S: 7",
    ],
)
def test_the_letters_of_a_list_of_pain_or_history_are_no_headings(listed):
    note = f"S: Knee pain.\n{listed}\nO: b\nA: c\nP: d"
    found = {"S": f"Knee pain.\n{listed}", "O": "b", "A": "c", "P": "d"}
    assert parse_note(note) == found
    assert normalize_headings(note) == (note, 0)
    # The letters of SOAPIE are those of its sections.
    assert parse_note("S: a\nO: b\nA: c\nP: d\nI: e\nE: f")["P"] == "d\nI: e\nE: f"


@pytest.mark.parametrize(
    "note",
    ['{"S": "a", "O": ["b"]}', '{"S": "a", "vitals": "b"}', '{"S": "a"', "<S>a</S> and more"]
    + ["<S>a</O>", "<x><S>a</S></x>", "[1]", "{}"],
)
def test_json_and_tags_of_something_else_stay_as_they_are(note):
    assert normalize_headings(note) == (note, 0)


def test_a_pulse_stays_a_pulse():
    note = "Subjective: a\nObjective: T 37\nP: 80\nS: 98 %\nAssessment: c\nPlan: d"
    written, count = normalize_headings(note)
    assert count == 4 and parse_note(written)["O"] == "T 37\nP: 80\nS: 98 %"
    assert parse_note("S: a\nO: b\nA: c\nP: 80 mg of aspirin")["P"] == "80 mg of aspirin"
