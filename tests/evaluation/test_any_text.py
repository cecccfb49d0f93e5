"""The scorer takes any text that a model may write, in a time linear in its length."""

import itertools
import json
import time

import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loop.config.cli import load_config
from loop.data.conversations import dialogue_text, note_text, read_split
from loop.data.soap import parse_note
from loop.evaluation.baselines import most_similar
from loop.evaluation.html_report import as_page, write_page
from loop.evaluation.scoring import Row, flagged, score_note, summarise
from loop.facts.matching import compare
from loop.facts.numerals import parse_items

REFERENCE = (
    "S: Pain in the left knee since 7/29/2008.\nO: 120/80.\nA: Gout.\nP: 500 mg twice a day."
)
# What a note may repeat or hold, a degenerate one first of all.
PIECES = {
    "digits": "9",
    "word": "pain ",
    "letters": "abc",
    "half a surrogate pair": "\ud83d",
    "headings": "S:\nO:\nA:\nP:\n",
    "line breaks": "\n",
    "spaces": " ",
    "heading without its colon": "S ",
    "control characters": "\x00\x1b\x7f\x85",
    "right to left": "\u202e\u0643\u062a\u0627\u0628 ",
    "Arabic digits": "\u0663",
    "two letters in lower case": "\u0130",
    "dates": "99/99/9999 ",
    "true dates": "7/29/2008 ",
    "different dates": "7/{}/2008 ",
    "long dates": "1/1/9999999999999999999999 ",
    "numbers with units": "99999999999999999999999 mg ",
    "doses": "{} mg ",
    "numbers": "{} ",
    "decimals": "3." + "1" * 50 + " ",
    "commas": ",",
    "thousands": "1,000,000,000,000,000,000 ",
    "grouped": ",000",
    "slashes": "1/",
    "points": "point nine ",
    "ands": "one thousand and ",
    "hundreds": "one hundred and a hundred and ",
    "tens": "twenty ",
    "sides": "left {} the right knee, ",
    "abbreviations": "b.i.d.",
    "apostrophes": "a'",
    "markdown": "* # ",
    "stars": "*",
    "times": "1:",
    "codes": "a1",
    "decades": "1s",
    "years": "in july of ",
    "markup": "<mark title=\"'&",
}


def repeat(piece: str, characters: int) -> str:
    """About so many characters of a piece; {} is another number each time."""
    count = max(1, characters // len(piece))
    return "".join(piece.replace("{}", str(i)) for i in range(count))


def score_all(text: str, reference: str = REFERENCE) -> dict:
    """All that an evaluation does with a note, and with a dialogue."""
    scores = {}
    for row in (Row("a", REFERENCE, reference, text), Row("b", text, reference, reference)):
        scores[row.id] = score_note(row)
        json.dumps([scores, [v.title for v in flagged(row)]]).encode()
        as_page("title", [row], "").encode("utf-8", "backslashreplace")
    summarise({"notes": list(scores.values())})
    most_similar([text, REFERENCE], [REFERENCE, text])
    parse_note(text)
    return scores


def supports_itself(text: str) -> bool:
    """Also that each fact and item stands where it says."""
    places = [(item.start, item.end) for item in parse_items(text)]
    assert all(0 <= start < end <= len(text) for start, end in places)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    found = compare(text, text)
    for v in found.note + found.dialogue:
        assert 0 <= v.statement.start < v.statement.end <= len(text)
    return all(v.verdict == "supported" for v in found.note + found.dialogue)


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_a_note_of_one_piece_is_scored(piece):
    for text in (piece, repeat(piece, 800), repeat(piece, 10_000)):
        score_all(text)
        assert supports_itself(text)


@pytest.mark.parametrize("text", ["", "\n", "S:", "1" * 798, "1/1/" + "1" * 798, "0" * 5000])
def test_a_short_odd_note_is_scored(text):
    scores = score_all(text)
    assert all(denominator >= 0 for pair in scores.values() for _, denominator in pair.values())


def stated(text: str) -> list[tuple[str, str]]:
    """(kind, value) of what a note states."""
    found = compare(text, text).note
    return [(v.statement.kind, v.statement.value) for v in found if v.statement.kind != "claim"]


def test_digits_beyond_a_float_are_a_number_of_its_own():
    """Another one does not support it; leading zeros and thousands' commas change nothing else."""
    digits = "1" * 798
    assert stated(digits) == [("number", digits)]
    assert compare(f"it was {digits}", digits).note[0].verdict == "supported"
    assert compare(digits + "1", digits).note[0].verdict == "not said"
    assert [value for _, value in stated("0" * 500 + "12 and 123,456,789,012,345")] == [
        "12",
        "123456789012345",
    ]


def test_a_fact_is_marked_where_it_stands_behind_a_letter_that_grows_in_lower_case():
    text = "\u0130\u0130\u0130 500 mg"
    (found,) = [v.statement for v in compare(text, text).note if v.statement.kind == "dose"]
    assert text[found.start : found.end] == "500 mg"


def test_half_a_surrogate_pair_is_shown_on_the_page(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "t\udc80", [Row("a", "\ud83d 5 mg", "\udfff", "6 mg \ud83d")], "")
    text = path.read_text("utf-8")
    assert "\\ud83d" in text and "\\udfff" in text and ">6 mg</mark>" in text


MIXED = st.lists(
    st.one_of(
        st.sampled_from(list(PIECES.values())),
        st.sampled_from(REFERENCE.split(" ")),
        st.text(st.characters(exclude_categories=()), max_size=5),
        st.integers().map(str),
        st.floats().map(str),
    ),
    max_size=40,
).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(MIXED)
def test_any_text_is_scored_and_supports_itself(text):
    score_all(text)
    assert supports_itself(text)
    own = score_note(Row("a", text, text, text))
    supported, stated = own["facts/supported"]
    assert supported == stated and own["facts/kept"] == own["facts/supported"]
    assert own["rouge1"][0] in (0, 1)


def test_the_embedded_texts_support_themselves():
    config = load_config(["--config", str(ROOT / "loop/configs/embedded.yaml")])
    conversations = [c for split in ("valid", "test") for c in read_split(config, split)[0]]
    texts = {f(c) for c in conversations for f in (dialogue_text, note_text)}
    assert len(texts) > 100 and all(map(supports_itself, sorted(texts)))


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_the_time_is_linear_in_the_text(piece):
    """Four times the text takes at most ten times as long; in quadratic time it takes 16 times.

    The best of some runs counts, and what takes a moment only counts as nothing.
    """

    def seconds(characters: int) -> float:
        text = repeat(piece, characters)
        found = []
        for _ in range(3):
            start = time.process_time()
            score_all(text)
            found.append(time.process_time() - start)
        return min(found)

    short, long = seconds(2_000), seconds(8_000)
    assert long < 0.2 or long < 10 * short
