"""What an evaluation reads, keeps and lists, without a model."""

from types import SimpleNamespace

import numpy as np
import pytest

from loop.config.cli import load_config
from loop.config.schema import ConfigError, TaskConfig
from loop.data.tokenization import Example
from loop.evaluation import run
from loop.evaluation.run import (
    EvaluationOptions,
    check_options,
    list_unsupported,
    open_notes,
    with_reference,
)
from loop.evaluation.scoring import Row

ALONE = SimpleNamespace(is_main=True, rank=0, world_size=1, all_gather_json=lambda value: [value])


def test_a_reference_of_another_column_needs_no_headings(config_file):
    config = load_config(["--config", str(config_file), "data.headings=required"])
    read = with_reference(config, "theirs").data
    assert (read.columns["note"], read.headings) == ("theirs", "optional")
    assert with_reference(config, None).data.columns == config.data.columns


@pytest.mark.parametrize(
    ("word", "options", "mistake"),
    [
        ("data={train: x, valid_fraction: 0}", {"split": "valid"}, "data.valid is not set$"),
        ("data={train: x, valid_fraction: 0}", {"split": "test"}, "data.test is not set$"),
        ("data={train: x}", {"split": "test"}, "--split valid takes the share that was held out"),
        ("data.columns={messages: m}", {"reference": "theirs"}, "map dialogue and note"),
        ("seed=1", {"compare": ("theirs.jsonl",)}, "--compare: the page shows them; name it with"),
    ],
)
def test_options_that_do_not_fit_the_configuration(config_file, word, options, mistake):
    config = load_config(["--config", str(config_file), word])
    with pytest.raises(ConfigError, match=mistake):
        check_options(config, EvaluationOptions(**{"split": "valid"} | options))


@pytest.mark.parametrize(
    "change",
    [
        {"word": ["generation.max_new_tokens=7"]},
        {"prompt": [5, 6, 8]},
        {"id": "2"},
        {"by": {"adapter": "another"}},
        {"task": {"headings": {"S": "Story", "P": "Plan"}, "request": "Write it."}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_notes_of_other_weights_settings_or_prompts_have_another_file(config_file, change):
    def file_of(word=(), prompt=(5, 6, 7), id="1", by=None, task=None) -> str:
        words = ["--config", str(config_file), "generation.forced_headings=true", *word]
        config = load_config(words)
        if task:
            config = config.model_copy(update={"task": TaskConfig(**task)})
        labels = np.array([-100] * len(prompt) + [1])
        examples = [Example(id, np.array([*prompt, 1]), labels)]
        options = EvaluationOptions("valid", by=by or {"adapter": "this"})
        with open_notes(config, options, examples, {id: "Doctor: hello"}, ALONE) as kept:
            return kept.path.name

    assert file_of() == file_of() != file_of(**change)


def test_contradictions_are_listed_first(monkeypatch):
    def flag(verdict: str, title: str) -> SimpleNamespace:
        statement = SimpleNamespace(kind="dose", start=0, end=1)
        return SimpleNamespace(verdict=verdict, title=title, statement=statement, is_critical=False)

    found = [flag("not said", "1 mg"), flag("contradicted", "9 mg"), flag("not said", "1 mg")]
    monkeypatch.setattr(run, "flagged", lambda row: found)
    listed = list_unsupported([Row("1", "", "", "P: x")])
    assert listed == {"1": ["contradicted, dose: 9 mg [P]", "not said, dose: 1 mg [P]"]}
