"""An HTML page to read notes on: dialogue, reference and note side by side.

Facts of the note that the dialogue does not support are marked, and so are facts of the dialogue
that the note lacks.
"""

import html
from pathlib import Path

from .facts import Fact, Statements
from .scoring import Row, unsupported

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:1.5em 2em;color:#222}pre{font-size:13px}
section{border-top:1px solid #bbb;margin-top:1.5em}h2{font-size:1em;margin:.7em 0}"""
STYLE += """h3{font-size:.8em;font-weight:normal;color:#666;margin:0}
.row{display:grid;grid-template-columns:5fr 4fr 4fr;gap:2em}"""
STYLE += """.row p{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0}
mark{background:#ffb4a8}u{text-decoration:underline dotted #06c 2px}"""
LEGEND = (
    "<p><mark>In the note and not in the dialogue</mark>; "
    "<u>in the dialogue and not in the note</u>. A fact is a number with its unit, how often, "
    "a date, a drug, or left and right; nothing else is checked. "
    "A clinician must review each note.</p>"
)


def mark_facts(text: str, found: list[Fact], tag: str, why: str) -> str:
    """The text as HTML, with each of these facts in a tag; its tooltip tells why."""
    parts = []
    end = 0
    for fact in found:
        mention = html.escape(text[fact.start : fact.end])
        parts.append(html.escape(text[end : fact.start]))
        parts.append(f'<{tag} title="{why}: {html.escape(fact.value)}">{mention}</{tag}>')
        end = fact.end
    return "".join(parts) + html.escape(text[end:])


def as_page(title: str, rows: list[Row], table: str) -> str:
    """One self-contained HTML page, the note with the most unsupported facts first.

    table: the metrics as text.
    """
    scored = [(unsupported(row), row) for row in rows]
    scored.sort(key=lambda pair: -len(pair[0]))
    body = [f"<h1>{html.escape(title)}</h1><pre>{html.escape(table)}</pre>", LEGEND]
    body += [_row_section(row, wrong) for wrong, row in scored]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}' + "\n".join(body)


def _row_section(row: Row, wrong: list[Fact]) -> str:
    """The part of the page about one note. wrong: its unsupported facts."""
    note = Statements(row.note)
    missed = [fact for fact in Statements(row.dialogue).facts if not note.supports(fact)]
    columns = {
        "dialogue": mark_facts(row.dialogue, missed, "u", "not in the note"),
        "reference": html.escape(row.reference),
        "note": mark_facts(row.note, wrong, "mark", "not in the dialogue"),
    }
    cells = "".join(f"<div><h3>{name}</h3><p>{text}</p></div>" for name, text in columns.items())
    ended = ", ran in circles" if row.looped else ""
    ended += ", cut off before its end" if row.ended is False else ""
    heading = f"<h2>{html.escape(row.id)}: {len(wrong)} unsupported{ended}</h2>"
    return f'<section>{heading}<div class="row">{cells}</div></section>'


def write_page(path: Path, title: str, rows: list[Row], table: str) -> None:
    """Writes the page, readable by its owner alone: it holds dialogues."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    # Half a surrogate pair, which UTF-8 lacks, is shown as \ud83d.
    path.write_text(as_page(title, rows, table), "utf-8", errors="backslashreplace")
