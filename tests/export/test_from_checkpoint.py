"""A checkpoint as its run would have exported it, without a model. With one: test_best.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from loop.config.cli import load_config
from loop.export import from_checkpoint
from loop.export.audit import AuditError
from loop.export.from_checkpoint import SavedStep, facts_of_run, read_checkpoint, trained_weights


@pytest.fixture
def saved(config_file, tmp_path):
    """Step 4 of a run whose data is gone."""
    config = load_config(["--config", str(config_file), f"data.train={tmp_path}/gone.jsonl"])
    manifest = {"files": {"a": ""}, "versions": {"torch": "of the training"}}
    return SavedStep(tmp_path / "step-000004", manifest, config, torch.bfloat16)


def test_a_weight_that_is_missing_or_of_another_shape_is_named(saved, monkeypatch):
    model = torch.nn.Linear(3, 2)
    masters = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    monkeypatch.setattr(from_checkpoint, "read_masters", lambda *args: masters.items())
    state = trained_weights(saved, model)
    assert state.keys() == {"weight", "bias"} and state["bias"].dtype == torch.bfloat16
    masters["bias"] = torch.ones(3)
    with pytest.raises(AuditError, match="its bias is not of the model in config.yaml"):
        trained_weights(saved, model)
    del masters["bias"]
    with pytest.raises(AuditError, match="step-000004: has no bias"):
        trained_weights(saved, model)


def test_the_card_tells_step_and_versions_of_the_training(saved):
    """Not today's; and where the data is not at hand nothing of it."""
    facts = facts_of_run(saved, SimpleNamespace())
    assert facts == {"steps": 4, "versions": {"torch": "of the training"}}


def test_a_run_is_read_where_it_lies_now(config_file, tmp_path, monkeypatch):
    """Its config.yaml names the folder in which it ran."""
    moved = tmp_path / "elsewhere" / "renamed"
    checkpoint = moved / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (moved / "config.yaml").write_text(config_file.read_text())
    (moved / "ds_config.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    monkeypatch.setattr(from_checkpoint, "verified_manifest", lambda path: {})
    read = read_checkpoint(str(checkpoint))
    assert read.config.folder == moved and (read.step, read.dtype) == (4, torch.bfloat16)
