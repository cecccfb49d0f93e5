"""Scores are the same on one core and on several, to the bit."""

import json
from types import SimpleNamespace

import pytest
from helpers import ROOT

from loop.data import parallel
from loop.data.conversations import Conversation
from loop.evaluation import run
from loop.evaluation.baselines import score_with_baselines
from loop.facts.challenge import challenge
from loop.generation.decode import Note

ROWS = [
    json.loads(line)
    for line in (ROOT / "loop/embedded/data/valid.jsonl").read_text().splitlines()[:24]
]


@pytest.fixture(scope="module")
def scored():
    """What is found with so many processes: scores, unsupported statements, the challenge."""
    conversations = [Conversation(row["id"], [], row["dialogue"], row["soap"]) for row in ROWS]
    chosen, train = conversations[:9], conversations[9:]
    # The notes of other visits, so that much is unsupported.
    notes = {c.id: Note(other.note, True) for c, other in zip(chosen, train)}
    alone = SimpleNamespace(rank=0, world_size=1, all_gather_json=lambda value: [value])

    def find(processes: int):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "count_processes", lambda *_: processes)
            rows, report = score_with_baselines(chosen, notes, train, alone)
            pairs = [(row.dialogue, row.reference) for row in rows[:5]]
            return report, run.list_unsupported(rows), run.challenge_all(pairs), pairs

    return find


def test_the_scores_of_several_processes_are_those_of_one(scored):
    one, several = scored(1), scored(3)
    assert json.dumps(one) == json.dumps(several)
    report, unsupported, counts, pairs = one
    assert report["facts/supported"]["value"] < 0.9 and len(unsupported) > 5
    assert report["rouge1"]["reference"] == 1.0 and report["rouge1"]["nearest note"] > 0
    assert counts == challenge(pairs)  # each pair keeps its number, which decides what is drawn
