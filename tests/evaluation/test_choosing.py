"""What makes a validation the best one."""

from types import SimpleNamespace

import pytest

from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.conversations import read_split
from loop.data.soap import SOAP
from loop.evaluation.baselines import rows_of, score_with_baselines
from loop.evaluation.choosing import Choice, chosen_examples, read_references, score_notes
from loop.evaluation.scoring import metrics_of, score_note
from loop.generation.decode import Note

NAN = float("nan")


class OneOf:
    """A rank among several. everyone: what all of them gather, of which its own is replaced."""

    def __init__(self, rank: int, world_size: int, everyone: list) -> None:
        self.rank, self.world_size, self.everyone = rank, world_size, everyone

    def all_gather_json(self, value):
        return [*self.everyone[: self.rank], value, *self.everyone[self.rank + 1 :]]


def choice_of(config_file, *args: str) -> Choice:
    return Choice.of(load_config(["--config", str(config_file), *args]))


def test_the_loss_chooses_unless_a_metric_is_named(config_file):
    assert choice_of(config_file) == Choice() and str(Choice()) == "validation loss"
    by_rouge = choice_of(config_file, "monitor.best=rouge1", "monitor.best_notes=2")
    assert str(by_rouge) == "rouge1 of 2 notes" and by_rouge.key == "eval/rouge1"
    by_samples = choice_of(config_file, "monitor.best=sections", "monitor.sample_notes=[valid-1]")
    assert str(by_samples) == "sections of 1 sample notes"
    for name in ("S/rouge2", "facts/kept", "facts/supported/drug", "ended", "section/P"):
        assert choice_of(config_file, f"monitor.best={name}", "monitor.best_notes=2").metric == name


@pytest.mark.parametrize(
    "name",
    ["rouge9", "repetition", "looped", "length", "markdown", "eval/loss", "facts/critical"],
)
def test_a_metric_that_cannot_choose_is_refused_with_those_that_can(config_file, name):
    with pytest.raises(ConfigError, match=f"^monitor.best={name}: must be one of loss, rouge1, "):
        choice_of(config_file, f"monitor.best={name}", "monitor.best_notes=2")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["monitor.best=rouge1"], "set monitor.best_notes"),
        (["monitor.best=rouge1", "monitor.best_notes=2", "data.supervise=all"], "no notes with"),
        (["run.export=best", "data.valid=null", "data.valid_fraction=0"], "set data.valid"),
        (["run.patience=2", "data.valid=null", "data.valid_fraction=0"], "set data.valid"),
        (["run.export=first"], "run.export"),
        (["run.patience=0"], "run.patience"),
        (["monitor.best_notes=0"], "monitor.best_notes"),
    ],
)
def test_a_choice_that_nothing_measures_is_refused(config_file, args, words):
    with pytest.raises(ConfigError, match=words):
        load_config(["--config", str(config_file), *args])


def test_the_lowest_loss_and_the_highest_metric_win_and_an_equal_one_does_not():
    loss, rouge = Choice(), Choice("rouge1", "2 notes")
    assert loss.is_better(1.0, 2.0) and not loss.is_better(2.0, 1.0)
    assert rouge.is_better(2.0, 1.0) and not rouge.is_better(1.0, 2.0)
    for choice in (loss, rouge):
        assert choice.is_better(1.0, None) and not choice.is_better(1.0, 1.0)
        assert not choice.is_better(None, None) and not choice.is_better(None, 1.0)


@pytest.mark.parametrize("bad", [NAN, float("inf"), None])
def test_what_is_missing_or_no_number_is_never_the_best(bad):
    choice = Choice("rouge1", "2 notes")
    assert choice.value({"eval/loss": 1.0, "eval/rouge1": bad}) is None
    assert choice.value({"eval/loss": 1.0}) is choice.value({}) is choice.value(None) is None
    assert choice.value({"eval/rouge1": 0.0}) == 0.0


def test_a_value_that_was_measured_on_other_notes_does_not_count():
    figures = {"eval/loss": 2.0, "eval/rouge1": 0.5}
    manifest = {"figures": figures, "best": {"by": "rouge1 of 2 notes"}}
    assert Choice("rouge1", "2 notes").value_of_checkpoint(manifest) == 0.5
    assert Choice("rouge1", "3 notes").value_of_checkpoint(manifest) is None
    assert Choice().value_of_checkpoint(manifest) == 2.0
    assert Choice().value_of_checkpoint({"figures": figures}) == 2.0  # of older code


def test_the_first_ids_are_chosen_whatever_their_order(config_file):
    examples = [SimpleNamespace(id=f"valid-{i}") for i in (3, 0, 2, 1)]
    data = SimpleNamespace(valid=examples, samples=examples[:1])
    config = load_config(["--config", str(config_file)])
    assert chosen_examples(config, data) == [] == read_references(config, [])
    args = ["--config", str(config_file), "monitor.best=rouge1"]
    config = load_config([*args, "monitor.best_notes=3"])
    assert [e.id for e in chosen_examples(config, data)] == ["valid-0", "valid-1", "valid-2"]
    assert [c.id for c in read_references(config, examples)] == [e.id for e in examples]
    config = load_config([*args, "monitor.sample_notes=[valid-3]"])
    assert chosen_examples(config, data) is data.samples
    with pytest.raises(ConfigError, match="data.valid has no other any more"):
        read_references(config, [SimpleNamespace(id="other")])


def test_the_scores_are_those_of_evaluate_on_any_number_of_ranks(config_file):
    config = load_config(["--config", str(config_file)])
    conversations = read_split(config, "valid")[0]
    notes = {
        c.id: Note(f"S: pain {i}\nP: aspirin {i} mg", i % 2 == 0)
        for i, c in enumerate(conversations)
    }
    alone = OneOf(0, 1, [None])
    expected = score_with_baselines(conversations, notes, [], alone)[1]
    figures = score_notes(conversations, notes, alone)
    assert figures == {f"eval/{name}": values["value"] for name, values in expected.items()}
    assert {"eval/rouge1", "eval/ended", "eval/sections", "eval/facts/supported"} <= set(figures)
    assert "eval/loss" not in figures and len(figures) <= len(metrics_of(SOAP))
    scores = [score_note(row) for row in rows_of(conversations, notes)]
    others = [scores[rank::4] for rank in range(4)]
    assert score_notes(conversations, notes, OneOf(3, 4, others)) == figures
    assert score_notes([], {}, alone) == {}
