"""The page on which a reviewer reads and rates notes: one file, which loads and sends nothing.

It lists the notes with the worst first. What a note states is marked by its verdict and linked to
where the dialogue speaks. With other systems' notes beside the first one's, letters stand for the
systems, shuffled anew for each dialogue; a key beside the page tells which is which.
"""

import base64
import csv
import hashlib
import html
import io
import random
from pathlib import Path
from typing import NamedTuple

from ..facts.judges.verdicts import SUPPORTED
from ..facts.matching import compare
from .scoring import Row

# PDQI-9 (Stetson et al. 2012, doi 10.4338/ACI-2011-11-RA-0070): each item and what it asks.
RATINGS = {
    "up-to-date": "it has the newest results and plans of the conversation",
    "accurate": "what it says is true",
    "thorough": "it has all that matters for this patient",
    "useful": "it is relevant, and helps whoever reads it next",
    "organized": "its parts stand where one looks for them",
    "comprehensible": "it is clear, without doubt about what is meant",
    "succinct": "it is brief, and says nothing twice",
    "synthesized": "it shows that the patient's state was understood and what follows from it",
    "internally consistent": "no part of it contradicts or ignores another one",
}
SCALE = "1: not at all, 5: extremely"
VERDICTS = {
    "supported": "the dialogue says it",
    "contradicted": "the dialogue says otherwise",
    "not said": "not in the dialogue",
    "missed": "not in the note",
}
FLAGGED = ("contradicted", "not said")
LEGEND = (
    '<p>In a note: <mark class="contradicted">contradicted by the dialogue</mark>, <mark>not said '
    'in it</mark>, <a class="supported">said</a>; each leads to its place in the dialogue. '
)
LEGEND_OF_DIALOGUE = 'In a dialogue: <mark class="missed">missing from the note</mark>. '
LEGEND_END = "Only what the scorer knows is checked. A clinician must review each note.</p>"
TOOLS = (
    '<p class="tools"><label>Rater <input id="rater"></label> '
    '<button type="button" id="save">Save the ratings as CSV</button> '
    '<label class="file">or go on from saved ones <input type="file" id="load" accept=".csv">'
    '</label> <output id="status"></output></p>'
)


class Span(NamedTuple):
    """A piece of a text, text[start:end], and what was found of it."""

    start: int
    end: int
    verdict: str  # a key of VERDICTS
    title: str  # what was understood, such as "5 mg"
    place: tuple[int, int] | None = None  # where the dialogue speaks of it: dialogue[start:end]
    critical: bool = False  # it may harm the patient


def note_spans(row: Row) -> list[Span]:
    """What the note states, each with its verdict, in the note's order and apart from each other.

    Where statements overlap, what is flagged is shown, contradictions before all.
    """
    found = [
        v for v in compare(row.dialogue, row.note).note if v.statement.kind != "claim" or v.place
    ]
    ranks = {"contradicted": 0, "not said": 1, "supported": 2}
    taken = bytearray(len(row.note))
    spans = []
    for v in sorted(found, key=lambda v: (ranks[v.verdict], v.statement.start)):
        start = v.statement.start
        end = v.statement.end
        if not any(taken[start:end]):
            taken[start:end] = b"\1" * (end - start)
            spans.append(Span(start, end, v.verdict, v.title, v.place, v.is_critical))
    return sorted(spans)


def dialogue_spans(row: Row) -> list[Span]:
    """What the dialogue states and the note does not, in the dialogue's order."""
    return [
        Span(v.statement.start, v.statement.end, "missed", v.title)
        for v in compare(row.dialogue, row.note).dialogue
        if v.verdict != SUPPORTED
    ]


class RatedNote(NamedTuple):
    """A note as the page shows it."""

    label: str  # "note", or a letter where the page is blinded
    row: Row
    spans: list[Span]

    @property
    def flags(self) -> list[Span]:
        return [span for span in self.spans if span.verdict in FLAGGED]

    @property
    def badness(self) -> tuple[int, int]:
        """(contradicted, flagged): higher is worse."""
        contradicted = sum(span.verdict == "contradicted" for span in self.flags)
        return contradicted, len(self.flags)


def as_page(
    title: str,
    rows: list[Row],
    table: str,
    about: dict[str, str] | None = None,
    others: dict[str, list[Row]] | None = None,
) -> str:
    """One self-contained HTML page, the note with the most flagged statements first.

    Args:
        title: of the page.
        rows: with the notes of the system that was evaluated.
        table: the metrics as text.
        about: what wrote the notes and how, by name.
        others: the same rows with other systems' notes, by system; given, the page is blinded and
            shows neither `about`, nor the metrics, nor the reference as such.
    """
    systems = [rows, *(others or {}).values()]
    orders = blind_orders(rows, len(systems))
    visits = []
    for number, row in enumerate(rows):
        labels = ["note"] if not others else [chr(65 + i) for i in range(len(systems))]
        notes = []
        for label, system in zip(labels, orders[number]):
            shown = systems[system][number]
            if others:  # how a note ended is known of the first system alone
                shown = shown._replace(ended=None, looped=False)
            notes.append(RatedNote(label, shown, note_spans(shown)))
        visits.append(notes)
    order = sorted(range(len(rows)), key=lambda i: [-n for n in max(v.badness for v in visits[i])])
    body = [f"<h1>{html.escape(title)}</h1>"]
    if others:
        body += [LEGEND, LEGEND_END]
    else:
        body += [_about(about or {}, table), LEGEND, LEGEND_OF_DIALOGUE, LEGEND_END]
    body.append(_index(visits, order))
    for before, i, after in zip([None, *order], order, [*order[1:], None]):
        body.append(_visit(i, visits[i], before, after, blinded=bool(others)))
    body.append(TOOLS)
    return _frame(title, "\n".join(body))


def _about(about: dict[str, str], table: str) -> str:
    """What wrote the notes and how, and the metrics, which are shown on request."""
    settings = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in about.items()
    )
    figures = f"<details><summary>figures</summary><pre>{html.escape(table)}</pre></details>"
    return f'<table class="about">{settings}</table>{figures}'


def _frame(title: str, body: str) -> str:
    """The page around its body. Its policy lets this style and this script run, nothing else."""
    style = Path(__file__).with_name("review_page.css").read_text()
    script = Path(__file__).with_name("review_page.js").read_text()
    allowed = " ".join(
        f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}';"
        for name, code in (("style", style), ("script", script))
    )
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; {allowed}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body>{body}<script>{script}</script></body></html>"
    )


def _index(visits: list[list[RatedNote]], order: list[int]) -> str:
    """A table that links to every note, in this order. The script fills in what is rated."""
    lines = []
    for i in order:
        name = html.escape(visits[i][0].row.id)
        for number, note in enumerate(visits[i]):
            contradicted, flagged = note.badness
            lines.append(
                f'<tr><td><a href="#v{i}">{name}</a></td><td>{note.label}</td>'
                f"<td>{contradicted}</td><td>{flagged - contradicted}</td>"
                f"<td>{len(note.row.note.split()):,}</td>"
                f'<td data-rated="v{i}-{number}-r"></td><td>{_ending(note.row)}</td></tr>'
            )
    heads = ("visit", "note", "contradicted", "not said", "words", "rated", "")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<table id="index"><tr>{head}</tr>{"".join(lines)}</table>'


def _ending(row: Row) -> str:
    looped = "ran in circles" if row.looped else ""
    cut_off = "cut off before its end" if row.ended is False else ""
    return ", ".join(filter(None, (looped, cut_off)))


def _visit(
    number: int, notes: list[RatedNote], before: int | None, after: int | None, blinded: bool
) -> str:
    """The part of the page about one dialogue. before, after: the visits beside it on the page."""
    anchor = f"v{number}"
    row = notes[0].row
    places = {span.place for note in notes for span in note.spans if span.place}
    missed = [] if blinded else dialogue_spans(row)
    columns = [_note(f"{anchor}-{i}", anchor, note) for i, note in enumerate(notes)]
    if not blinded:
        reference = f'<p class="text">{html.escape(row.reference)}</p>'
        columns.append(f"<div><h3>reference</h3>{reference}</div>")
    dialogue = _mark_dialogue(row.dialogue, missed, sorted(places), anchor)
    counts = [f"{n.label}: {_counts(n)}" if blinded else _counts(n) for n in notes]
    endings = "".join(f", {ending}" for ending in map(_ending, [n.row for n in notes]) if ending)
    neighbours = (("previous", before), ("next", after))
    links = "".join(f' <a href="#v{i}">{word}</a>' for word, i in neighbours if i is not None)
    return (
        f'<section id="{anchor}"><h2>{html.escape(row.id)}: {"; ".join(counts)}{endings}</h2>'
        f'<nav><a href="#index">index</a>{links}</nav><div class="visit">'
        f'<div class="dialogue"><h3>dialogue</h3><p class="text">{dialogue}</p></div>'
        f'<div class="notes">{"".join(columns)}</div></div></section>'
    )


def _note(anchor: str, visit: str, note: RatedNote) -> str:
    """A note with its marks, the list of its flags, and its blank ratings.

    anchor, visit: the ids of the note and of its dialogue's part of the page.
    """
    return (
        f'<div><h3>{note.label} <a href="#{anchor}-r">rate</a></h3>'
        f'<p class="text">{_mark_note(anchor, visit, note)}</p>'
        f'<ul class="flags">{_flags(anchor, visit, note)}</ul>{_rating(f"{anchor}-r", note)}</div>'
    )


def _mark_note(anchor: str, visit: str, note: RatedNote) -> str:
    """The note as HTML: each statement is marked, and linked to where the dialogue speaks."""
    text = note.row.note
    parts = []
    end = 0
    for i, span in enumerate(note.spans):
        parts.append(html.escape(text[end : span.start]))
        mention = html.escape(text[span.start : span.end])
        title = html.escape(f"{VERDICTS[span.verdict]}: {span.title}")
        target = f' href="#{visit}-p{span.place[0]}"' if span.place else ""
        if span.verdict in FLAGGED:
            mention = f"<a{target}>{mention}</a>" if target else mention
            css = ' class="contradicted"' if span.verdict == "contradicted" else ""
            parts.append(f'<mark{css} id="{anchor}-f{i}" title="{title}">{mention}</mark>')
        else:
            parts.append(f'<a class="supported"{target} title="{title}">{mention}</a>')
        end = span.end
    return "".join([*parts, html.escape(text[end:])])


def _flags(anchor: str, visit: str, note: RatedNote) -> str:
    """A line for each flagged statement: its mark in the note, and its place in the dialogue."""
    lines = []
    for i, span in enumerate(note.spans):
        if span.verdict in FLAGGED:
            said = VERDICTS[span.verdict]
            if span.place:
                said = f'<a href="#{visit}-p{span.place[0]}">{said}</a>'
            critical = ", <b>critical</b>" if span.critical else ""
            mark = f'<a href="#{anchor}-f{i}">{html.escape(span.title)}</a>'
            lines.append(f"<li>{mark}: {said}{critical}</li>")
    return "".join(lines)


def _counts(note: RatedNote) -> str:
    contradicted, flagged = note.badness
    return f"{contradicted} contradicted, {flagged - contradicted} not said"


def _rating(anchor: str, note: RatedNote) -> str:
    """Blank fields: PDQI-9's items and a remark."""
    points = "".join(f"<option>{i}</option>" for i in ("", *range(1, 6)))
    fields = "".join(
        f'<label title="{meaning}">{item} <select data-item="{item}">{points}</select></label>'
        for item, meaning in RATINGS.items()
    )
    return (
        f'<fieldset class="rating" id="{anchor}" data-id="{html.escape(note.row.id)}" '
        f'data-note="{note.label}"><legend>{note.label}, rated ({SCALE})</legend>{fields}'
        '<label class="remark">remark <input data-item="remark"></label></fieldset>'
    )


def _mark_dialogue(
    text: str, missed: list[Span], places: list[tuple[int, int]], anchor: str
) -> str:
    """The dialogue as HTML: what the note lacks is marked, and each place can be linked to."""
    titles = {(span.start, span.end): span.title for span in missed}
    parts = []
    end = 0
    for start, stop in sorted({*titles, *places}):
        anchored = f' id="{anchor}-p{start}"' if (start, stop) in places else ""
        if start < end:  # inside the one before, whose link it shares
            parts.append(f'<span class="place"{anchored}></span>' if anchored else "")
            continue
        parts.append(html.escape(text[end:start]))
        mention = html.escape(text[start:stop])
        if (start, stop) in titles:
            title = html.escape(f"{VERDICTS['missed']}: {titles[start, stop]}")
            parts.append(f'<mark class="missed place"{anchored} title="{title}">{mention}</mark>')
        else:
            parts.append(f'<span class="place"{anchored}>{mention}</span>')
        end = stop
    return "".join([*parts, html.escape(text[end:])])


def blind_orders(rows: list[Row], num_systems: int) -> list[list[int]]:
    """For each row, the systems in the order of their letters: shuffled, equal at each call."""
    orders = []
    for row in rows:
        order = list(range(num_systems))
        seed = f"{row.id}\0{row.dialogue}".encode(errors="surrogatepass")
        random.Random(seed).shuffle(order)
        orders.append(order)
    return orders


def blinding_key(rows: list[Row], systems: list[str]) -> str:
    """The CSV that tells which system wrote which note of a blinded page."""
    out = io.StringIO()
    lines = csv.writer(out)
    lines.writerow(["id", "note", "system"])
    for row, order in zip(rows, blind_orders(rows, len(systems))):
        lines.writerows([row.id, chr(65 + i), systems[n]] for i, n in enumerate(order))
    return out.getvalue()


def write_page(
    path: Path,
    title: str,
    rows: list[Row],
    table: str,
    about: dict[str, str] | None = None,
    others: dict[str, list[Row]] | None = None,
) -> None:
    """Writes the page, and PAGE.key.csv where it is blinded; as `as_page`.

    They are readable by their owner alone: the page holds dialogues.
    """
    _write_private(path, as_page(title, rows, table, about, others))
    if others:
        key = blinding_key(rows, [(about or {}).get("notes by", "notes"), *others])
        _write_private(path.with_suffix(".key.csv"), key)


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    # Half a surrogate pair, which UTF-8 lacks, is shown as \ud83d.
    path.write_text(text, "utf-8", errors="backslashreplace")
