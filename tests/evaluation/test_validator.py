"""A validation in mid-run: what is logged, and what a request to stop leaves due."""

from types import SimpleNamespace

import pytest

from loop.checkpoint.train_state import TrainState
from loop.config.schema import RunConfig, TaskConfig
from loop.evaluation import validator as module
from loop.evaluation.validator import Validator
from loop.generation.decode import Note


@pytest.fixture
def validator(monkeypatch):
    """One with made-up figures: a loss, and the text of each note."""
    found = object.__new__(Validator)
    found.config = SimpleNamespace(generation=None, task=TaskConfig())
    found.packing = found.engine = found.tokenizer = None
    found.data = SimpleNamespace(valid=["a", "b", "c"], samples=["a"])
    found.ranks = SimpleNamespace(world_size=1, any=bool, all_gather_json=lambda figures: [figures])
    found.stop = SimpleNamespace(requested=False)
    found.chosen, found.dialogues, found.references = found.data.samples, {}, ["a"]
    found.logged, found.written = [], []
    found.logger = SimpleNamespace(log_validation=lambda *args: found.logged.append(args))

    def write(engine, tokenizer, examples, *args, **options):
        found.written.append(examples)
        return {e: Note(f"note on {e}", True) for e in examples}

    monkeypatch.setattr(
        module, "evaluate_loss", lambda *args: {} if found.stop.requested else {"eval/loss": 2.0}
    )
    monkeypatch.setattr(module, "generate_sharded", write)
    monkeypatch.setattr(
        module, "score_notes", lambda references, notes, *args: {"eval/notes": float(len(notes))}
    )
    return found


def test_figures_are_recorded_and_logged_with_the_sample_notes(validator):
    state = TrainState(RunConfig(), step=3)
    assert validator.run(state) and not state.validation_due and state.best == 2.0
    figures = {"eval/loss": 2.0, "eval/notes": 1.0}
    assert state.eval_metrics == figures
    assert validator.logged == [(3, figures, {"a": "note on a"})]
    assert validator.written == [["a"]]  # the samples are what is scored: written once


def test_notes_that_are_scored_are_written_beside_the_samples(validator):
    validator.chosen = ["b", "c"]
    assert validator.run(TrainState(RunConfig(), step=3))
    assert validator.written == [["a"], ["b", "c"]]
    assert validator.logged[0][1]["eval/notes"] == 2 and validator.logged[0][2].keys() == {"a"}


@pytest.mark.parametrize("who", ["this rank", "another", "before it"])
def test_a_validation_that_is_broken_off_stays_due(validator, who):
    state = TrainState(RunConfig(), step=3)
    if who == "this rank":
        validator.stop.requested = True
    elif who == "another":
        validator.ranks.any = lambda flag: True
    assert not validator.run(state, skip=who == "before it")
    assert state.validation_due and state.best is None and not validator.logged


def test_without_validation_examples_nothing_is_due(validator):
    validator.data.valid = []
    state = TrainState(RunConfig(), step=3)
    assert validator.run(state) and not state.validation_due and not validator.logged


def test_what_rank_0_measured_counts_on_all(validator):
    validator.ranks.all_gather_json = lambda figures: [{"eval/loss": 1.5}, figures]
    state = TrainState(RunConfig(), step=3)
    assert validator.run(state) and state.best == 1.5
