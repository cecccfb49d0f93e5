"""The flags on human notes that were read one by one.

flags_read.csv holds flags on the validation notes of ACI-Bench and MTS-Dialog, by place, without a
word of them: those that stand today, and those on MTS-Dialog's notes that were mended. A language
model, which also wrote the rules, read each against its dialogue: "right", "elaboration" (unsaid in
so many words, plainly meant) or "false alarm". No clinician has read them.
"""

import csv
import json
from pathlib import Path

import pytest
from helpers import SHARED

from loop.facts.matching import check
from loop.facts.verdicts import distinct

CORPORA = {"aci_bench": "aci-", "mts_dialog": "mts-"}


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
def test_what_was_rightly_flagged_still_is_and_half_the_flags_that_were_read_are_no_alarms(corpus):
    data = SHARED / "data" / corpus / "valid.jsonl"
    if not data.exists():
        pytest.skip(f"needs {data}")
    with Path(__file__).with_name("flags_read.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["id"].startswith(CORPORA[corpus])]
    read = {(r["id"], int(r["start"]), r["kind"]): r["label"] for r in rows}
    flagged, stated = set(), 0
    for row in map(json.loads, data.read_text().splitlines()):
        for v in distinct(check(row["dialogue"], row["soap"])):
            stated += v.statement.kind != "claim"
            if v.verdict != "supported":
                flagged.add((row["id"], v.statement.start, v.statement.kind))
    right = [key for key, label in read.items() if label == "right"]
    assert len(flagged & set(right)) >= 0.95 * len(right) >= 18
    known = [read[key] for key in flagged if key in read]
    assert len(known) >= 55 and sum(label != "false alarm" for label in known) > len(known) / 2
    alarms = [key for key in flagged if read.get(key) == "false alarm" and key[2] != "claim"]
    assert len(alarms) < 0.06 * stated
