"""The flags on human notes that were read one by one.

flags_read.csv holds the 96 flags on MTS-Dialog's validation notes at one time, by place, without a
word of them. A language model, which also wrote the rules, read each against its dialogue: "right",
"elaboration" (unsaid in so many words, plainly meant) or "false alarm". No clinician has read them.
"""

import csv
import json
from pathlib import Path

import pytest
from helpers import SHARED

from loop.facts.matching import compare, distinct

DATA = SHARED / "data" / "mts_dialog" / "valid.jsonl"


@pytest.mark.slow
def test_what_was_rightly_flagged_still_is_and_half_the_flags_that_were_read_are_no_alarms():
    if not DATA.exists():
        pytest.skip(f"needs {DATA}")
    with Path(__file__).with_name("flags_read.csv").open() as file:
        read = {(r["id"], int(r["start"]), r["kind"]): r["label"] for r in csv.DictReader(file)}
    flagged = set()
    for row in map(json.loads, DATA.read_text().splitlines()):
        for v in distinct(compare(row["dialogue"], row["soap"]).note):
            if v.verdict != "supported":
                flagged.add((row["id"], v.statement.start, v.statement.kind))
    right = [key for key, label in read.items() if label == "right"]
    assert len(read) == 96 and len(right) == 27
    assert len(flagged & set(right)) >= 26
    known = [read[key] for key in flagged if key in read]
    assert len(known) > 60 and sum(label != "false alarm" for label in known) > len(known) / 2
