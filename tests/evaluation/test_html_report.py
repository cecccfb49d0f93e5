"""The page on which notes are read."""

import stat

from loop.evaluation.html_report import as_page, write_page
from loop.evaluation.scoring import Row

ROWS = [
    Row("good", "Patient: <b>I take aspirin 81 mg</b>", "S: ref", "S: aspirin 81 mg."),
    Row("bad", "Patient: x", "S: ref", "S: takes 5 mg & heparin.", False),
]


def test_what_is_unsupported_or_missed_is_marked_in_its_place():
    page = as_page("t", ROWS, "figures")
    assert (
        '<mark title="not in the dialogue: 5 mg">5 mg</mark> &amp; '
        '<mark title="not in the dialogue: heparin">heparin</mark>.'
    ) in page
    assert page.count("<mark title") == 2
    assert "S: aspirin 81 mg." in page and "&lt;b&gt;I take" in page
    missed = as_page("t", [ROWS[0]._replace(note="S: nothing")], "figures")
    assert (
        '<u title="not in the note: aspirin">aspirin</u> '
        '<u title="not in the note: 81 mg">81 mg</u>'
    ) in missed


def test_the_worst_note_comes_first_and_a_cut_off_one_is_named():
    page = as_page("t", ROWS, "figures")
    worst = page.index("bad: 2 unsupported, cut off before its end")
    assert worst < page.index("good: 0 unsupported<")
    looped = as_page("t", [ROWS[0]._replace(ended=False, looped=True)], "figures")
    assert "unsupported, ran in circles, cut off before its end" in looped


def test_the_page_needs_nothing_else_and_is_its_owners(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    write_page(path, "t", ROWS, "figures")
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text.startswith("<!doctype html>") and "old" not in text
    assert not any(word in text for word in ("http", "src=", "<script", "@import", "url("))
