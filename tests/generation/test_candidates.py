"""Of several notes on a dialogue the one that agrees best with it is given."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loop.config.cli import load_config
from loop.config.schema import GenerationSettings
from loop.data.tokenization import Example
from loop.evaluation.scoring import Row, score_note
from loop.generation import candidates, sharded
from loop.generation.candidates import (
    agree_each,
    agreement,
    choose,
    read_dialogues,
    write_best_notes,
)
from loop.generation.decode import Note, write_notes
from loop.generation.engine import NoteRequest
from loop.generation.notes_file import KeptNotes
from loop.generation.sharded import WeightAccess, generate_sharded, make_requests, prompt_of
from loop.model.loading import load_tokenizer

DIALOGUE = (
    "Doctor: How long have you had the cough?\nPatient: For 5 days. I have a fever too.\n"
    "Doctor: Any chest pain?\nPatient: No.\nDoctor: Take 40 mg of prednisone daily."
)
WHOLE = "Cough for 5 days, fever. No chest pain. Prednisone 40 mg daily."
PART = "Fever for 5 days."
WRONG = "Cough for 9 days, no fever. Chest pain. Prednisone 20 mg daily. Left knee pain."
EMPTY = "The visit was pleasant."


def chosen(dialogue: str, *notes: Note) -> Note:
    return choose(notes, agree_each([(dialogue, note.text) for note in notes]))


def test_the_choice_prefers_facts_that_agree_and_notes_that_ended():
    whole, part, wrong, empty = (Note(text, True) for text in (WHOLE, PART, WRONG, EMPTY))
    assert agreement(DIALOGUE, WHOLE) > agreement(DIALOGUE, PART) > agreement(DIALOGUE, WRONG)
    assert chosen(DIALOGUE, wrong, empty, part, whole) is whole
    assert chosen(DIALOGUE, wrong, Note(WHOLE, False), Note(WHOLE, False, True), part) is part
    assert chosen(DIALOGUE, wrong, Note(WHOLE, True, True)) is wrong  # a section ran in circles
    cut_off = Note(WHOLE, False)
    assert chosen(DIALOGUE, Note(PART, False), cut_off) is cut_off
    again = Note(WHOLE, True)
    assert chosen(DIALOGUE, again, whole) is again  # of equals the first
    assert chosen(DIALOGUE, empty, Note("", True)) is empty  # without facts the first
    assert chosen("Patient: hello", wrong, whole) is wrong


def test_what_chooses_are_the_scores_of_facts_and_no_reference():
    for note in (WHOLE, PART, WRONG, EMPTY):
        for reference in (WHOLE, WRONG):
            scores = score_note(Row("1", DIALOGUE, reference, note))
            parts = [scores[name] for name in ("facts/supported", "facts/kept")]
            right, kept = (n / of if of else 0.0 for n, of in parts)
            # The harmonic mean of right, right and kept.
            mean = 3 / (2 / right + 1 / kept) if right * kept else 0.0
            assert agreement(DIALOGUE, note) == pytest.approx(mean)
    prompt, dialogues = [5, 6, 7], {"a": DIALOGUE}
    settings = GenerationSettings(temperature=1, candidates=2)
    answers = (
        Example("a", np.array([*prompt, *note]), np.array([-100] * len(prompt) + note))
        for note in ([8, 9], [10])
    )
    one, other = (make_requests([e], dialogues, settings) for e in answers)
    assert one == other == [NoteRequest("a", prompt, 600, dialogue=DIALOGUE)]


@pytest.mark.parametrize("synced", [False, True])
def test_the_chosen_notes_come_in_the_order_of_their_requests(monkeypatch, synced):
    """In lockstep no batch is longer than that of the requests."""
    texts = {"a#0": WRONG, "a#1": WHOLE, "a#2": PART, "b#0": PART, "b#1": EMPTY, "b#2": WRONG}
    monkeypatch.setattr(candidates, "NOTES_AT_A_TIME", 1)  # so that forks compare them
    batches = []

    def write(model, tokenizer, requests, generation, synced):
        batches.append([r.key for r in requests])
        return [Note(texts[r.key], True) for r in requests]

    monkeypatch.setattr(candidates, "write_notes", write)
    requests = [NoteRequest(key, [1], 9, dialogue=DIALOGUE) for key in "ab"]
    settings = GenerationSettings(temperature=1, candidates=3)
    notes = write_best_notes(None, None, requests, settings, synced=synced)
    assert [note.text for note in notes] == [WHOLE, PART]
    assert [len(batch) for batch in batches] == ([2, 2, 2] if synced else [6])
    assert sorted(sum(batches, [])) == sorted(texts)


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            eos_token_id=2,
        )
    ).eval()


def test_the_candidates_are_the_same_whatever_is_beside_them(model, tokenizer, monkeypatch):
    requests = [NoteRequest(k, [5 + i] * (9 + 7 * i), 16, dialogue=k) for i, k in enumerate("abc")]
    settings = GenerationSettings(temperature=1.2, candidates=3, seed=4)
    drawn: dict[str, list[tuple[Note, ...]]] = {}

    def record(notes, dialogues):
        drawn.setdefault(dialogues[0], []).append(notes)
        return notes[-1]

    monkeypatch.setattr(candidates, "agree_each", lambda pairs: [d for d, _ in pairs])
    monkeypatch.setattr(candidates, "choose", record)
    together = write_best_notes(model, tokenizer, requests, settings)
    alone = [write_best_notes(model, tokenizer, [r], settings, rows=2)[0] for r in requests[::-1]]
    plain = write_best_notes(model, tokenizer, requests, settings, partitioned=True)
    assert together == alone[::-1] == plain
    assert all(first == second == third for first, second, third in drawn.values())
    assert len({note.text for (notes, *_) in drawn.values() for note in notes}) == 9
    last = [dataclasses.replace(r, key=f"{r.key}#2") for r in requests]
    assert write_notes(model, tokenizer, last, settings) == together
    one = settings.model_copy(update={"candidates": 1})
    assert write_best_notes(model, tokenizer, requests, one) == write_notes(
        model, tokenizer, requests, one
    )


class OneOfSeveral:
    """A rank that sees its own notes alone."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def all_gather_json(self, value) -> list:
        return [json.loads(json.dumps(value))]

    def any(self, flag: bool) -> bool:
        return flag


def test_any_number_of_ranks_keeps_the_same_chosen_notes(model, tokenizer, monkeypatch, tmp_path):
    """And no other candidate, each under the id of its dialogue."""
    access = WeightAccess(gathered=False, partitioned=False, lockstep=False)
    monkeypatch.setattr(sharded, "choose_access", lambda *_: access)
    monkeypatch.setattr(candidates, "agree_each", lambda pairs: [len(d) for d, _ in pairs])
    monkeypatch.setattr(candidates, "choose", lambda notes, lengths: notes[lengths[0]])
    examples = [
        Example(key, np.array([5 + i] * (9 + 7 * i) + [2]), np.array([-100] * (9 + 7 * i) + [2]))
        for i, key in enumerate("abc")
    ]
    dialogues = {"a": "", "b": "x", "c": "xx"}  # candidate 0, 1 and 2
    settings = GenerationSettings(temperature=1.2, candidates=3, seed=4, max_new_tokens=16)
    engine = SimpleNamespace(module=model, empty_partition_cache=lambda: None)
    wanted = [NoteRequest(f"{e.id}#{i}", prompt_of(e).tolist(), 16) for i, e in enumerate(examples)]
    notes = write_notes(model, tokenizer, wanted, settings)
    for world_size in (1, 2):
        path = tmp_path / f"{world_size}" / "notes.jsonl"
        several = [OneOfSeveral(rank, world_size) for rank in range(world_size)]
        files = [KeptNotes(path, dialogues, {"adapter": "x"}, ranks) for ranks in several]
        for ranks, kept in zip(several, files):
            generate_sharded(
                engine, tokenizer, examples, dialogues, settings, ranks, rows=1, kept=kept
            )
            kept.close()
        found = KeptNotes(path, dialogues, {"adapter": "x"}, OneOfSeveral(0, 1)).found
        assert found == dict(zip("abc", notes))


def test_dialogues_are_read_where_there_are_candidates(config_file, rows):
    config = load_config(["--config", str(config_file)])
    assert read_dialogues(config, "valid") == {}
    several = ["generation.candidates=2", "generation.temperature=1"]
    found = read_dialogues(load_config(["--config", str(config_file), *several]), "valid")
    lines = [json.loads(line) for line in open(rows["valid"])]
    assert found == {row["id"]: row["dialogue"] for row in lines}
