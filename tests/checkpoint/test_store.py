"""Checkpoints on the disk: what is safe before what, and what is counted."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import note_disk_operations
from safetensors import SafetensorError

from loop.checkpoint import checkpointer as module
from loop.checkpoint import store as store_module
from loop.checkpoint.checkpointer import Checkpointer
from loop.checkpoint.store import CheckpointStore
from loop.checkpoint.train_state import TrainState
from loop.config.schema import ConfigError, RunConfig
from loop.evaluation.choosing import Choice


def write(store: CheckpointStore, step: int) -> None:
    store.write(
        step, iter([{"w.master": torch.zeros(4)}, {"v.master": torch.ones(2)}]), {"step": step}
    )


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A machine that loses its power after the rename must not leave a name without content."""
    done = note_disk_operations(monkeypatch, "rename")
    store = CheckpointStore(tmp_path, 2)
    write(store, 3)
    at = done.index(("rename", "step-000003"))
    files = ("state-00000.safetensors", "state-00001.safetensors", "manifest.json")
    assert {("fsync", name) for name in (*files, ".writing-000003")} <= set(done[:at])
    assert ("fsync", "checkpoints") in done[at:]
    done.clear()
    store.amend(store.folder / "step-000003", {"figures": {}})
    assert done[:2] == [("fsync", ".manifest.json"), ("fsync", "step-000003")]


def test_steps_are_numbers_and_not_texts(tmp_path):
    store = CheckpointStore(tmp_path, 9)
    for step in (200, 1_000, 999_999, 1_000_000):
        write(store, step)
    paths = [int(path.name[5:]) for path in store.finished()]
    assert paths == [200, 1_000, 999_999, 1_000_000]
    assert store.newest()[0].name == "step-1000000"


def test_a_kill_between_a_checkpoint_and_its_links_leaves_no_older_newest(tmp_path, monkeypatch):
    """The run that goes on may have no step left, and so write no checkpoint that links anew."""
    store = CheckpointStore(tmp_path, 2)
    write(store, 14)
    with monkeypatch.context() as killed:
        killed.setattr(CheckpointStore, "_tidy", lambda self, newest: None)
        write(store, 15)
    assert (store.folder / "newest").readlink().name == "step-000014"
    checkpointer = checkpointer_of(tmp_path)
    checkpointer.identity.check_compatible = lambda *_: []
    checkpointer.find_latest(range(15))
    assert checkpointer.path.name == "step-000015"
    assert (store.folder / "newest").readlink().name == "step-000015"


def checkpointer_of(folder, **run) -> Checkpointer:
    """Of a run of ten steps on one rank. run: what its configuration says of the run."""
    alone = SimpleNamespace(is_main=True, rank=0, any=bool, all_gather_json=lambda value: [value])
    config = SimpleNamespace(
        run=RunConfig(**run), monitor=SimpleNamespace(best="loss"), model_dump=lambda mode: {}
    )
    identity = SimpleNamespace(at_step=lambda plan, step: {}, versions={})
    checkpointer = Checkpointer(folder, alone, config, identity)
    checkpointer.plan = range(10)
    return checkpointer


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_of_the_last_ones_stay(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep)
    for step in range(1, 6):
        write(store, step)
    kept = [int(path.name[5:]) for path in store.finished()]
    assert kept == [1, 2, 3, 4, 5][-keep:]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_said_whoever_finds_it_and_leaves_nothing(tmp_path, monkeypatch, error):
    """safetensors raises an error of its own, which is no OSError."""

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(store_module, "save_file", full)
    monkeypatch.setattr(module, "gather_full_state", lambda *_: iter([{"w.master": torch.ones(1)}]))
    monkeypatch.setattr(module, "adam_step", lambda engine: 1)
    monkeypatch.setattr(module.dist, "barrier", lambda: None)
    checkpointer, said = checkpointer_of(tmp_path), []
    logger = SimpleNamespace(flush=lambda: None, say=said.append, scalars=None)
    checkpointer.save(None, TrainState(RunConfig(), step=5), logger)
    assert said and said[0].startswith("checkpoint of step 5 not written: ")
    assert "No space left" in said[0] and list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_of_another_content_or_size_is_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, 9)
    write(store, 1)
    write(store, 2)
    file = store.folder / "step-000002" / "state-00001.safetensors"
    content = file.read_bytes()
    for spoilt in (content + b"\0", content[:-1] + b"\1", content[:-1]):
        file.write_bytes(spoilt)
        path, manifest, notes = store.newest()
        assert path.name == "step-000001" and "step-000002 passed over" in notes[0]
        assert json.loads((path / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize("name", ["step-0x10", "step-１０", "step-²", "step-10.old", "step--1"])
def test_what_only_looks_like_a_step_is_no_checkpoint(tmp_path, name):
    store = CheckpointStore(tmp_path, 9)
    write(store, 1)
    shutil.copytree(store.folder / "step-000001", store.folder / name)
    path, _, notes = store.newest()
    assert path.name == "step-000001" and store.finished() == [path]
    assert len(notes) == 1 and notes[0].endswith("passed over: is no name of a checkpoint")
    write(store, 2)
    assert (store.folder / name / "manifest.json").is_file()  # nobody else's folder is deleted


def test_a_checkpoint_by_another_steps_name_is_none(tmp_path):
    """The run would make steps again that a checkpoint has, or leave some out."""
    store = CheckpointStore(tmp_path, 9)
    for step in (1, 2):
        write(store, step)
    shutil.copytree(store.folder / "step-000001", store.folder / "step-000009")
    path, _, notes = store.newest()
    assert path.name == "step-000002"
    assert notes == ["step-000009 passed over: manifest.json is of step 1"]


def test_of_a_linked_checkpoint_the_link_alone_is_deleted(tmp_path):
    """As where a disk was full and its checkpoints were moved to another."""
    store = CheckpointStore(tmp_path / "run", 1)
    write(store, 1)
    (store.folder / "step-000001").rename(tmp_path / "moved")
    (store.folder / "step-000001").symlink_to(tmp_path / "moved")
    assert store.newest()[0].name == "step-000001"
    write(store, 2)
    assert {p.name for p in store.folder.iterdir()} == {"step-000002", "newest", "best"}
    assert (tmp_path / "moved" / "manifest.json").is_file()


@pytest.mark.parametrize("target", ["nothing", "/etc", "../..", "newest", "step-000001"])
def test_where_the_links_lead_decides_nothing(tmp_path, target):
    store = CheckpointStore(tmp_path, 9)
    for step in (1, 2):
        write(store, step)
    for name in ("newest", "best"):
        (store.folder / name).unlink()
        (store.folder / name).symlink_to(target)
    assert store.newest()[0].name == "step-000002"
    store.link_anew()
    assert (store.folder / "newest").readlink().name == "step-000002"


@pytest.mark.parametrize("lost", [set(), {"sealed"}, {"sha256"}], ids=str)
def test_a_manifest_that_says_something_else_is_no_checkpoint(tmp_path, lost):
    """Also where the change took one of the two keys of its seal away."""
    store = CheckpointStore(tmp_path, 9)
    write(store, 1)
    file = store.folder / "step-000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert store.newest()[1] == manifest
    kept = {key: value for key, value in manifest.items() if key not in lost}
    file.write_text(json.dumps(kept | {"optimizer_step": 9}))
    path, _, notes = store.newest()
    assert path is None and "manifest.json is not what was written" in notes[0]


def test_the_runs_sigmas_decide_what_is_a_spike():
    losses = [1.0, 3.0] * 10  # mean 2, deviation 1
    for sigmas, threshold in ((3.0, 5.0), (1.5, 3.5), (None, float("inf"))):
        state = TrainState(RunConfig(skip_loss_sigmas=sigmas))
        for loss in losses:
            state.record(loss, applied=True)
            state.record(100.0, applied=False)  # a skipped one is no part of what is usual
        assert state.loss_threshold == pytest.approx(threshold)


def test_where_no_checkpoint_is_whole_a_person_decides(tmp_path):
    checkpointer = checkpointer_of(tmp_path)
    assert checkpointer.find_latest(range(10)).step == 0  # a new run
    write(checkpointer.store, 1)
    (checkpointer.store.folder / "step-000001" / "state-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match="no checkpoint is whole .step-000001 passed over"):
        checkpointer.find_latest(range(10))


@pytest.mark.parametrize(
    ("export", "choice", "saved"),
    [
        ("last", Choice(), False),
        ("best", Choice(), True),
        ("last", Choice("rouge1", "2 notes"), True),
    ],
)
def test_the_best_validation_is_saved_where_its_weights_may_be_wanted(
    tmp_path, monkeypatch, export, choice, saved
):
    """Between two steps that are saved anyway."""
    checkpointer, steps = checkpointer_of(tmp_path, export=export, save_steps=100), []
    checkpointer.choice = choice
    monkeypatch.setattr(
        checkpointer, "save", lambda engine, state, logger: steps.append(state.step)
    )
    for step, is_best in ((3, True), (4, False), (10, False)):
        state = SimpleNamespace(step=step, ended=False, is_best=is_best)
        checkpointer.save_if_due(None, state, False, None)
    assert steps == [3, 10] if saved else steps == [10]


@pytest.mark.parametrize(
    ("export", "exported", "value"), [("best", 2, 1.0), ("last", 3, None), ("none", 3, None)]
)
def test_the_best_weights_are_put_back_where_they_are_exported(
    tmp_path, monkeypatch, export, exported, value
):
    checkpointer, put_back, said = checkpointer_of(tmp_path, export=export), [], []
    for step, loss in ((2, 1.0), (3, 2.0)):
        tensors = iter([{"weight.master": torch.full((2, 2), float(step))}])
        checkpointer.store.write(step, tensors, {"step": step, "figures": {"eval/loss": loss}})
    monkeypatch.setattr(
        module, "scatter_full_tensor", lambda p, kind, full, ranks: put_back.append(full)
    )
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2), empty_partition_cache=lambda: None)
    state = SimpleNamespace(step=3)
    checkpointer.restore_best(engine, state, SimpleNamespace(say=said.append))
    assert state.exported_step == exported
    assert [full.tolist() for full in put_back] == ([[[2.0] * 2] * 2] if value else [])
    assert (f"best by validation loss: {value:.4f}" in said[0]) if value else not said
