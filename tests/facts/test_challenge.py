"""Notes made wrong in one place, and whether it is noticed."""

import json

from helpers import ROOT

from loop.facts.challenge import FALSE_ALARMS, KINDS, as_table, challenge, corrupt

DIALOGUE = """Doctor: how is your left knee?
Patient: it hurts, for three weeks now. I take ibuprofen 600 mg twice a day and metformin 500 mg.
Doctor: any fever?
Patient: no.
Doctor: continue the metformin."""
NOTE = """S: Reports pain in the left knee for 3 weeks. Denies fever. Ibuprofen 600 mg twice a day.
P: Continue metformin 500 mg."""


def test_a_note_is_changed_in_one_place_for_each_kind_it_offers():
    found = {c.kind: c.note for c in corrupt(NOTE, DIALOGUE, 0)}
    assert set(found) <= set(KINDS) and all(note != NOTE for note in found.values())
    assert "Denies pain in" in found["reports -> denies"]
    assert "right knee" in found["side"] and "Stop metformin" in found["continue -> stop"]
    assert {c.kind: c.note for c in corrupt(NOTE, DIALOGUE, 0)} == found


def test_a_scorer_that_flags_everything_or_nothing_notices_nothing(monkeypatch):
    """So the share noticed can't be had by flagging more."""
    for verdict in ("supported", "not said"):
        monkeypatch.setattr("loop.facts.matching._judge", lambda index, s: made(s, verdict))
        counts = challenge([(DIALOGUE + f" {verdict}", NOTE)])
        assert counts["side"] == [int(verdict == "not said"), 1]


def made(statement, verdict):
    from loop.facts.judges.verdicts import Verdict

    return Verdict(statement, verdict, None)


def test_the_embedded_notes_raise_few_alarms_and_their_faults_are_noticed():
    rows = [
        json.loads(line)
        for line in (ROOT / "loop/embedded/data/test.jsonl").read_text().splitlines()
    ][:25]
    counts = challenge((row["dialogue"], row["soap"]) for row in rows)
    flagged, stated = counts[FALSE_ALARMS]
    assert stated > 500 and flagged < 0.02 * stated
    for kind in ("dose x 10", "blood pressure", "frequency", "invented diagnosis"):
        seen, tried = counts[kind]
        assert tried >= 10 and seen >= 0.9 * tried, kind
    assert "dose x 10" in as_table(counts) and "100.0 %" in as_table(counts)
