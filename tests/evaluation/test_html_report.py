"""The page on which notes are read and rated."""

import base64
import csv
import hashlib
import html.parser
import re
import stat

from loop.evaluation import html_report
from loop.evaluation.html_report import RATINGS, Span, as_page, blinding_key, write_page
from loop.evaluation.scoring import Row
from loop.facts import matching

ROWS = [
    Row("good", "Patient: <b>I take aspirin 81 mg</b>", "S: ref", "S: aspirin 81 mg."),
    Row("bad", "Patient: x", "S: ref", "S: takes 5 mg & heparin.", False),
]
HOSTILE = "\"><script>alert(1)</script><img src=x onerror='a'>&lt;"


class Elements(html.parser.HTMLParser):
    """The tags and the attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def test_what_is_unsupported_or_missed_is_marked_in_its_place():
    page = as_page("t", ROWS, "figures")
    assert re.search(
        r'<mark id="v1-0-f0" title="not in the dialogue: 5 mg of heparin">5 mg</mark> &amp; ', page
    )
    assert 'title="not in the dialogue: heparin">heparin</mark>.' in page
    assert page.count('title="not in the dialogue') == 2
    assert (
        "&lt;b&gt;I take" in page
        and 'title="the dialogue says it: 81 mg of aspirin">81 mg</a>.' in page
    )
    missed = as_page("t", [ROWS[0]._replace(note="S: nothing")], "figures")
    assert '<mark class="missed place" title="not in the note: aspirin">aspirin</mark>' in missed
    assert 'title="not in the note: 81 mg of aspirin">81 mg</mark>' in missed


def test_the_worst_note_comes_first_and_a_cut_off_one_is_named():
    page = as_page("t", ROWS, "figures")
    worst = page.index("bad: 0 contradicted, 2 not said, cut off before its end")
    assert page.index('href="#v1">bad') < page.index('href="#v0">good') < worst
    assert worst < page.index("good: 0 contradicted, 0 not said<")
    looped = as_page("t", [ROWS[0]._replace(ended=False, looped=True)], "figures")
    assert "not said, ran in circles, cut off before its end" in looped


def test_a_contradiction_leads_to_its_place_and_comes_before_what_nobody_said(monkeypatch):
    spans = {"S: 5 mg": [Span(3, 7, "contradicted", "5 mg", (9, 14))], "S: x y": []}
    spans["S: x y"] = [Span(3, 4, "not said", "x"), Span(5, 6, "not said", "y")]
    monkeypatch.setattr(html_report, "note_spans", lambda row: spans[row.note])
    rows = [Row(f"{i}", "Patient: 50 mg", "ref", note) for i, note in enumerate(reversed(spans))]
    page = as_page("t", rows, "")
    assert page.index('<section id="v1"') < page.index('<section id="v0"')
    assert '<a href="#v1-p9">5 mg</a></mark>' in page and 'id="v1-p9"' in page
    assert '5 mg</a>: <a href="#v1-p9">the dialogue says otherwise</a>' in page
    assert "<h2>1: 1 contradicted, 0 not said" in page
    spans["S: 5 mg"] = [Span(0, 7, "supported", "it")]
    marked = as_page("t", [Row("1", "Patient: 50 mg", "ref", "S: 5 mg")], "")
    assert ">S: 5 mg</a>" in marked
    spans["<i> & 5"] = [Span(0, 7, "not said", "it")]
    marked = as_page("t", [Row("1", "Patient: 50 mg", "ref", "<i> & 5")], "")
    assert ">&lt;i&gt; &amp; 5</mark>" in marked and "<i>" not in marked


def test_where_statements_overlap_the_flagged_one_is_shown(monkeypatch):
    row = ROWS[1]
    found = matching.compare(row.dialogue, row.note)
    (flag, *_) = [v for v in found.note if v.verdict == "not said"]
    for other, shown in (("supported", "not said"), ("contradicted", "contradicted")):
        both = found._replace(note=[flag._replace(verdict=other), flag])
        monkeypatch.setattr(html_report, "compare", lambda *texts, both=both: both)
        assert [span.verdict for span in html_report.note_spans(row)] == [shown]


def test_what_may_harm_is_called_critical():
    row = Row("1", "Patient: I take aspirin 81 mg", "S: ref", "S: aspirin 810 mg. Has diarrhea.")
    flags = re.findall(r"<li>.*?</li>", as_page("t", [row], ""))
    assert any("810 mg" in flag and "<b>critical</b>" in flag for flag in flags)
    unharmful = [flag for flag in flags if "diarrhea" in flag]
    assert unharmful and not any("critical" in flag for flag in unharmful)


def test_each_visit_leads_to_the_ones_beside_it():
    rows = [ROWS[0]._replace(id=f"{i}", note=f"S: {'5 mg, ' * i}") for i in range(3)]
    page = as_page("t", rows, "")
    links = re.findall(r'<section id="(v\d)">.*?<nav>(.*?)</nav>', page)
    beside = [(name, re.findall(r'href="#(v\d)">(previous|next)', nav)) for name, nav in links]
    names = [name for name, _ in beside]
    assert len(names) == 3
    assert beside == [
        (names[0], [(names[1], "next")]),
        (names[1], [(names[0], "previous"), (names[2], "next")]),
        (names[2], [(names[1], "previous")]),
    ]


def test_hostile_texts_stay_texts_and_every_link_has_its_end():
    """Ids, notes, dialogues, settings: none of them adds a tag, an attribute or an anchor."""
    plain, hostile = (
        Elements(
            as_page(
                word, [Row(word, f"{word} 5 mg", word, f"{word} 5 mg 6 mg")], word, {word: word}
            )
        )
        for word in ("word", HOSTILE)
    )
    assert hostile.tags == plain.tags and HOSTILE in hostile.text
    assert [key for key, _ in hostile.attributes] == [key for key, _ in plain.attributes]
    anchors = hostile.values("id")
    assert len(anchors) == len(set(anchors)) and all(re.fullmatch(r"[\w-]+", a) for a in anchors)
    assert {link.removeprefix("#") for link in hostile.values("href")} <= set(anchors)


def test_each_note_has_blank_ratings():
    elements = Elements(as_page("t", ROWS, ""))
    assert elements.values("data-item") == [*RATINGS, "remark"] * 2
    assert "selected" not in dict(elements.attributes) and len(RATINGS) == 9
    assert elements.text.count("1: not at all, 5: extremely") == 2
    assert elements.values("data-rated") == [i for i in elements.values("id") if i.endswith("-r")]


def test_a_blinded_page_tells_no_system_and_its_key_does(tmp_path):
    rows = [Row(f"id{i}", "Doctor: hello", f"gold {i}", f"mine {i}", False) for i in range(40)]
    others = {"reference": [row._replace(note=row.reference) for row in rows]}
    path = tmp_path / "page.html"
    write_page(path, "t", rows, "figures", {"notes by": "adapter-x"}, others)
    page = path.read_text()
    assert "missing from the note" not in page and "missing from the note" in as_page("t", rows, "")
    assert not any(word in page for word in ("adapter-x", "figures", "reference<", "cut off"))
    key = (tmp_path / "page.key.csv").read_bytes().decode()
    assert key == blinding_key(rows, ["adapter-x", "reference"])
    entries = list(csv.DictReader(key.splitlines()))
    firsts = [entry["system"] for entry in entries if entry["note"] == "A"]
    assert 8 < firsts.count("adapter-x") < 32 and len(entries) == 80
    for entry in entries[:4]:
        text = {"adapter-x": "mine", "reference": "gold"}[entry["system"]]
        section = page.split(f"<h2>{entry['id']}:")[1].split("</section>")[0]
        note = section.split(f"<h3>{entry['note']} ")[1].split("</p>")[0]
        assert f'<p class="text">{text}' in note


def test_the_page_needs_nothing_else_and_is_its_owners(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    write_page(path, "t", ROWS, "figures", {"notes by": "runs/mine/adapter"})
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text.startswith("<!doctype html>") and "old" not in text
    assert "<th>notes by</th><td>runs/mine/adapter</td>" in text
    assert not any(word in text for word in ("http:", "https:", "src=", "@import", "url(", "fetch"))
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; base-uri 'none'; form-action 'none'; " in text
    assert f"script-src 'sha256-{digest}'" in text
