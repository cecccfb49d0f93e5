"""Which rank writes which notes, and what is kept of a run that is asked to stop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loop.config.schema import GenerationSettings
from loop.data.tokenization import Example
from loop.generation import sharded
from loop.generation.decode import Note
from loop.generation.engine import NoteRequest
from loop.generation.sharded import WeightAccess, batch_by_length, generate_sharded, share_of

LOCKSTEP, ALONE = WeightAccess(False, True, True), WeightAccess(True, False, False)


def one_of_ranks(rank: int, world_size: int):
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        all_gather_json=lambda value: [value],
    )


def test_in_lockstep_a_rank_without_a_batch_of_its_own_takes_part():
    a, b, c = ([NoteRequest(key, [5], 1)] for key in "abc")
    for way, second in ((ALONE, [b]), (LOCKSTEP, [b, a])):
        assert share_of([a, b, c], {}, way, one_of_ranks(0, 2)) == ([a, c], 2)
        assert share_of([a, b, c], {}, way, one_of_ranks(1, 2)) == (second, 1)
    # A batch that is there already is nobody's.
    done = {"b": Note("", True)}
    assert share_of([a, b, c], done, LOCKSTEP, one_of_ranks(1, 2)) == ([c], 1)


def test_prompts_of_like_length_are_a_batch():
    requests = [NoteRequest(f"{9 - n}", [5] * n, 1) for n in (5, 1, 4, 2, 3)]
    batches = batch_by_length(requests, 2)
    assert [[len(r.prompt) for r in batch] for batch in batches] == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize("stops", [False, True])
def test_a_batch_that_was_cut_off_is_not_kept(monkeypatch, stops):
    """The second of two is written when the run is asked to stop."""
    stop, kept = SimpleNamespace(requested=False), []

    def write(model, tokenizer, batch, *_, **__):
        stop.requested = stops and batch[0].key == "1"
        return [Note(request.key, True) for request in batch]

    monkeypatch.setattr(sharded, "choose_access", lambda *_: WeightAccess(False, False, False))
    monkeypatch.setattr(sharded, "write_best_notes", write)
    ids = np.arange(4, dtype=np.int32)
    labels = np.array([-100, -100, 2, 3], np.int32)
    generate_sharded(
        SimpleNamespace(module=None),
        None,
        [Example(key, ids, labels) for key in ("0", "1")],
        {},
        GenerationSettings(),
        one_of_ranks(0, 1),
        stop,
        rows=1,
        kept=SimpleNamespace(found={}, add=kept.append),
    )
    whole = [{"0": Note("0", True)}, {"1": Note("1", True)}]
    assert kept == whole[: 1 if stops else 2]
