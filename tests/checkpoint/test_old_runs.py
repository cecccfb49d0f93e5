"""Runs that older code wrote are read, audited and resumed.

run_5b52756 was written by commit 5b52756, before keys were renamed: one rank on a CPU, four steps.
Its checkpoint of step 2 is the last one here, as if the run had been killed in step 4.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import CPU, PYTHON, ROOT, free_port

from loop.checkpoint.identity import RunIdentity
from loop.checkpoint.run_dir import lines_to_keep
from loop.config.cli import RENAMED, load_config
from loop.config.schema import Config
from loop.data.batch_plan import plan_batches
from loop.data.dataset import load_training_data
from loop.export.audit import check_adapter
from loop.model.loading import load_tokenizer
from loop.model.lora import read_adapter

WRITTEN = ROOT / "tests" / "checkpoint" / "run_5b52756"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """The folder of the run, below a working directory as the one it was started in."""
    shutil.copytree(WRITTEN / "old", tmp_path / "runs" / "old")
    shutil.copytree(WRITTEN / "base", tmp_path / "base")
    shutil.copy(WRITTEN / "rows.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "old"


def value_at(tree, key: str):
    for name in key.split("."):
        tree = tree[name] if isinstance(tree, dict) else getattr(tree, name)
    return tree


def metrics_of(run_dir, key: str) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def test_its_configuration_is_read_under_todays_names(old_run):
    path = old_run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    config = load_config(["--config", str(path)])
    for old, new in RENAMED.items():
        assert value_at(config, new) == value_at(tree, old), old
    assert config.run.max_skipped_in_a_row == 4 and config.data.valid_fraction == 0.2


def test_its_adapter_is_read_and_is_the_one_it_wrote(old_run):
    trained = read_adapter(str(old_run / "adapter"))
    assert (trained["base"], trained["storage"], trained["method"]) == ("base", "nf4", "qlora")
    assert check_adapter(str(old_run / "adapter")) == trained


def identity_now(config: Config):
    tokenizer = load_tokenizer(config.base, config.revision)
    data = load_training_data(config, tokenizer)
    budget = (config.tokens_per_step, config.seed, config.epochs, config.max_steps)
    plan = plan_batches(data.lengths, *budget, data.weights)
    return RunIdentity.of(config, tokenizer, data.train, plan), plan


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("run.name=x", []),
        ("cache_dequantized_weights=true", ["cache_dequantized_weights was False and is True"]),
    ],
)
def test_its_checkpoint_belongs_to_the_same_run_today(old_run, option, changes):
    identity, plan = identity_now(load_config(["--config", str(old_run / "config.yaml"), option]))
    path = old_run / "checkpoints" / "step-000002"
    manifest = json.loads((path / "manifest.json").read_text())
    assert "keep_dequantized" in manifest["identity"]["settings"]
    notes = identity.check_compatible(path, manifest, plan, force=False)
    assert notes == [f"changed     {change} from step 3 on" for change in changes]


def test_its_log_is_kept_up_to_its_checkpoint(old_run):
    lines = lines_to_keep((old_run / "metrics.jsonl").read_text(), 2, True)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 2]


def test_it_is_resumed_and_its_next_steps_are_those_of_the_old_code(old_run):
    written = {key: metrics_of(old_run, key) for key in ("train/loss", "eval/loss")}
    env = CPU | {"PYTHONPATH": str(ROOT)}
    bf16 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": True}}
    Path("bf16.json").write_text(json.dumps(bf16))  # as the old code computed on any machine
    done = subprocess.run(
        [
            *(PYTHON, "-m", "loop.train", "--config", "runs/old/config.yaml"),
            f"deepspeed={Path('bf16.json').resolve()}",
        ],
        env=os.environ | env | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from runs/old/checkpoints/step-000002" in done.stdout
    assert "changed" not in done.stdout
    for key, values in written.items():
        # Another CPU rounds products in bf16 another way: 1.2e-4 on two others.
        assert metrics_of(old_run, key) == pytest.approx(values, rel=1e-3)
    assert json.loads((old_run / "report.json").read_text())["steps"] == 4
