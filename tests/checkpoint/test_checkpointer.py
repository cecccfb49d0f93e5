"""A run that is broken off goes on as if it had not been, on the same ranks to the bit and on
others to rounding.
"""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, run_ok, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loop.checkpoint import checkpointer as checkpointer_module
from loop.checkpoint.checkpointer import Checkpointer
from loop.checkpoint.store import CheckpointStore
from loop.checkpoint.train_state import TrainState
from loop.config.cli import load_config
from loop.config.schema import ConfigError, RunConfig
from loop.data.batch_plan import plan_run
from loop.data.dataset import load_examples, visit_weights
from loop.evaluation.choosing import Choice
from loop.model.loading import load_tokenizer

STEPS = 6


def write_config(folder: Path, base: str) -> Path:
    """A configuration of six steps, in a file of `folder`."""
    fp32 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
    (folder / "fp32.json").write_text(json.dumps(fp32))
    config = {
        "base": base,
        "data": {
            "train": write_rows(folder / "train.jsonl", "train", 40, 1),
            "valid": write_rows(folder / "valid.jsonl", "valid", 4, 2),
        },
        "max_seq_len": 512,
        "batch_size": 4,
        "lr": 1e-3,
        "max_steps": STEPS,
        "run": {"dir": str(folder), "save_steps": 2, "export_check_examples": 0},
        "monitor": {"eval_steps": 2},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    path = write_config(folder, tiny_base)
    loaded = load_config(["--config", str(path), "data.cache=false"])
    examples, _ = load_examples(loaded, load_tokenizer(tiny_base), "train")
    lengths = np.array([len(e) for e in examples])
    plan = plan_run(loaded, lengths, visit_weights(examples))
    bad = [examples[plan[step - 1][0]].id for step in (2, 4)]
    (folder / "bad.json").write_text(json.dumps([bad, [len(plan[step - 1]) for step in (2, 4)]]))
    exact = [f"deepspeed={folder / 'fp32.json'}"]

    def case(name: str, run: str, *args: str, **patch) -> dict:
        return {
            "name": name,
            "args": ["--config", str(folder / "config.yaml"), f"run.name={run}", *args],
            "out": str(folder / "out"),
            "patch": patch,
        }

    def start(world_size: int, *cases: dict) -> None:
        (folder / "cases.json").write_text(json.dumps(cases))
        run_ok(world_size, "tests/proofs/worker.py", str(folder / "cases.json"))

    start(
        2,
        case("whole", "whole"),
        case("first half", "broken", stop_after=3),
        case("second half", "broken"),
        case("bad", "bad", bad_example=bad),
        case("bad first half", "bad halves", bad_example=bad, stop_after=3),
        case("bad second half", "bad halves", "lr=2e-3", "max_steps=7", bad_example=bad),
        case("exact", "exact", *exact),
        case("full disk", "disk", disk_full=1),
        case("other LoRA", "whole", "lora.r=4"),
        case("other data", "whole", "data.limit=39"),
    )
    start(4, case("four ranks", "elastic", *exact, stop_after=2))
    start(
        2,
        case("two ranks", "elastic", *exact, stop_after=1),
        case("spoilt", "spoilt", "max_steps=1", spoil_export=1),
        case("mended", "spoilt", "max_steps=1"),
        case("early", "early", "run.max_hours=1e-9"),
    )
    start(1, case("one rank", "elastic", *exact, "micro_batch_size=2", stop_after=2))
    start(4, case("four ranks again", "elastic", *exact))
    return folder


def curve(folder: Path, key: str) -> list:
    return [
        line[key]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if key in line
    ]


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(runs):
    assert json.loads((runs / "out" / "first half.json").read_text())["report"]["steps"] == 3
    for key in ("train/loss", "train/grad_norm", "train/lr", "eval/loss"):
        assert curve(runs / "whole", key) == curve(runs / "broken", key), key
    whole, broken = (
        load_file(runs / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    halves = [load_file(runs / "out" / f"{name}.safetensors") for name in ("whole", "second half")]
    assert all(
        torch.equal(halves[0][f"final.weight.{i}"], halves[1][f"final.weight.{i}"])
        for i in range(len(whole))
    )


def test_a_failed_audit_fails_the_run_and_the_same_command_writes_again(runs):
    spoilt, mended = (
        json.loads((runs / "out" / f"{name}.json").read_text()) for name in ("spoilt", "mended")
    )
    assert (
        spoilt["error"].startswith("AuditError: the audit of")
        and "is empty, of shape" in spoilt["error"]
        and not spoilt["report"]
    )
    assert mended["error"] is None and not (runs / "spoilt" / ".writing-adapter").exists()
    assert mended["report"]["steps"] == 1 and any("resumed from" in line for line in mended["said"])
    assert (runs / "spoilt" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_is_asked_to_stop_before_its_first_step_hands_out_nothing(runs):
    early = json.loads((runs / "out" / "early.json").read_text())
    assert (
        early["error"] is None
        and early["report"]["steps"] == 0
        and "exported" not in early["report"]
    )
    assert (
        any("no step has changed a weight" in line for line in early["said"])
        and not (runs / "early" / "adapter").exists()
    )


def test_metrics_show_one_curve(runs):
    for name in ("broken", "elastic"):
        steps = [
            json.loads(line)["step"]
            for line in (runs / name / "metrics.jsonl").read_text().splitlines()
            if "train/loss" in line
        ]
        assert steps == list(range(1, STEPS + 1))


def test_another_number_of_ranks_and_another_cut_go_on_with_the_same_steps(runs):
    """4 ranks, then 2, then 1 with smaller micro-batches, then 4: in fp32 the curves differ by
    rounding alone, with dropout on.
    """
    exact, elastic = (curve(runs / name, "train/loss") for name in ("exact", "elastic"))
    assert elastic == pytest.approx(exact, rel=1e-5) and exact[0] != exact[-1]


def test_a_bad_example_skips_its_step_and_is_named_before_and_after_a_resume(
    runs,
):
    records = [
        json.loads((runs / "out" / f"{name}.json").read_text())
        for name in ("bad", "bad first half", "bad second half")
    ]
    whole, first, second = (
        [line for line in record["said"] if "skipped on all ranks" in line] for record in records
    )
    assert len(whole) == 2 and len(first) == 1 and whole == first + second
    for line, step, bad, size in zip(
        whole, (2, 4), *json.loads((runs / "bad.json").read_text())
    ):  # of the micro-batch, which is a part of the step
        ids = line.split("examples ")[1].split(", ")
        assert line.startswith(f"step {step}: loss nan") and bad in ids and len(ids) < size
    for name in ("bad", "bad halves"):  # NaN stands in the log, and its step counts
        assert curve(runs / name, "train/skipped_steps") == [1, 2]
        assert [
            i + 1 for i, loss in enumerate(curve(runs / name, "train/loss")) if loss != loss
        ] == [2, 4]
    manifests = [
        json.loads((runs / name / "checkpoints" / "newest" / "manifest.json").read_text())
        for name in ("bad", "bad halves")
    ]
    assert [
        (m["step"], m["optimizer_step"], m["skipped"], len(m["recent_losses"])) for m in manifests
    ] == [(6, 4, 2, 4), (7, 5, 2, 5)]
    assert (
        manifests[0]["recent_losses"][:2] == manifests[1]["recent_losses"][:2]
    )  # of steps 1 and 3


def test_other_settings_are_taken_and_said(runs):
    said = json.loads((runs / "out" / "bad second half.json").read_text())["said"]
    for change in ("lr was 0.001 and is 0.002", "max_steps was 6 and is 7", "steps was 6 and is 7"):
        assert any(line.startswith(f"changed     {change} from step 4 on") for line in said), change
    assert curve(runs / "bad halves", "train/lr")[3] > 1.5 * curve(runs / "bad", "train/lr")[3]


def test_a_full_disk_does_not_end_the_run(runs):
    record = json.loads((runs / "out" / "full disk.json").read_text())
    assert record["report"]["steps"] == STEPS
    assert (
        len([line for line in record["said"] if "not written" in line and "No space left" in line])
        == STEPS // 2
    )
    assert not list((runs / "disk" / "checkpoints").glob("step-*"))


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(runs):
    errors = [
        json.loads((runs / "out" / f"{name}.json").read_text())["error"]
        for name in ("other LoRA", "other data")
    ]
    assert (
        "lora.r was 8 and is 4 now" in errors[0]
        and "run.resume=false" in errors[0]
        and "force" not in errors[0]
    )
    assert "examples was" in errors[1] and "run.resume=force" in errors[1]


def test_the_last_checkpoints_are_kept_whole_and_without_pickle(runs):
    folder = runs / "whole" / "checkpoints"
    losses = {
        p.name: json.loads((p / "manifest.json").read_text())["figures"]["eval/loss"]
        for p in folder.glob("step-*")
    }
    assert {"step-000004", "step-000006"} <= losses.keys() and len(losses) <= 3
    assert {p.name for p in folder.iterdir()} == losses.keys() | {"newest", "best"}
    assert (folder / "newest").readlink().name == "step-000006" and (
        folder / "best"
    ).readlink().name == min(losses, key=losses.get)
    for path in (runs / "whole").rglob("*"):
        assert path.suffix not in {".pt", ".bin", ".pkl", ".pth"}, path
    with safe_open(
        runs / "whole" / "checkpoints" / "step-000006" / "state-00000.safetensors", "pt"
    ) as file:
        kinds = [key.rsplit(".", 1)[1] for key in file.keys()]
        assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())
    assert kinds.count("master") == kinds.count("exp_avg") == kinds.count("exp_avg_sq") == 2 * 7 * 3


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def kept(runs, tmp_path) -> CheckpointStore:
    shutil.copytree(runs / "whole" / "checkpoints", tmp_path / "checkpoints")
    return CheckpointStore(tmp_path, 2)


def checkpointer_in(run_dir: Path) -> Checkpointer:
    """That of the only rank of a run."""
    alone = SimpleNamespace(is_main=True, all_gather_json=lambda value: [value], any=bool)
    config = SimpleNamespace(
        run=SimpleNamespace(keep_checkpoints=2, resume=True),
        monitor=SimpleNamespace(best="loss"),
        model_dump=lambda mode: {},
    )
    identity = SimpleNamespace(at_step=lambda plan, step: {}, versions={})
    return Checkpointer(run_dir, alone, config, identity)


def test_a_torn_checkpoint_is_passed_over_and_said(kept):
    newest = kept.folder / "step-000006"
    assert kept.newest()[0] == newest and kept.newest()[1]["step"] == 6
    flip_a_bit(newest / "state-00000.safetensors")
    path, manifest, remarks = kept.newest()
    assert (
        path.name == "step-000004"
        and manifest["step"] == 4
        and "step-000006 passed over: state-00000.safetensors is not what" in remarks[0]
    )
    (kept.folder / "step-000004" / "manifest.json").unlink()
    path, _, remarks = kept.newest()
    assert path is None and len(remarks) == 2


def test_a_write_that_is_cut_off_leaves_the_old_ones(kept, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loop.checkpoint.store.save_file", full)
    with pytest.raises(OSError):
        kept.write(8, iter([{}]), {})
    path, _, remarks = kept.newest()
    assert path.name == "step-000006" and remarks == [
        "writing-000008 passed over: it was never finished"
    ]


def a_write(store: CheckpointStore, step: int, loss: float | None = None) -> None:
    store.write(
        step,
        iter([{"w.master": torch.zeros(4)}]),
        {"step": step, "figures": {"eval/loss": loss} if loss else {}},
    )


def steps(store: CheckpointStore) -> list[int]:
    return [int(p.name[5:]) for p in store.finished()]


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, 2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, float("nan"))):
        a_write(store, step, loss)
    assert steps(store) == [2, 4, 5]  # 2 has the lowest validation loss
    a_write(store, 1_000_000, 0.5)
    assert (
        steps(store) == [5, 1_000_000] and store.newest()[1]["step"] == 1_000_000
    )  # more digits than the name has room for
    assert (store.folder / "best").resolve() == store.newest()[0] and (
        store.folder / "best" / "manifest.json"
    ).is_file()


def test_the_best_is_the_earliest_of_equal_ones_and_the_next_whole_one(tmp_path):
    store = CheckpointStore(tmp_path, 9)
    assert store.best() == (None, {})
    for step, loss in ((1, float("nan")), (2, None), (3, 2.0), (4, 1.0), (5, 1.0)):
        a_write(store, step, loss)
    best, manifest = store.best()
    assert best.name == "step-000004" and manifest["step"] == 4
    assert (store.folder / "best").readlink().name == "step-000004"
    flip_a_bit(best / "state-00000.safetensors")
    assert store.best()[0].name == "step-000005"
    (store.folder / "step-000005" / "manifest.json").write_text("{")
    assert store.best()[0].name == "step-000003"


def test_the_best_goes_by_the_metric_of_the_notes_that_were_asked_for(tmp_path):
    choice = Choice("rouge1", "2 notes")
    store = CheckpointStore(tmp_path, 1, choice)
    values = [(1, 0.2, choice), (2, 0.5, choice), (3, 0.9, Choice("rouge1", "3 notes"))]
    for step, value, by in [*values, (4, 0.5, choice), (5, None, choice)]:
        figures = {"eval/loss": 9.0 - step} | ({"eval/rouge1": value} if value else {})
        manifest = {"step": step, "figures": figures, "best": {"by": str(by)}}
        store.write(step, iter([{"w.master": torch.zeros(4)}]), manifest)
    assert steps(store) == [2, 5] and store.best()[0].name == "step-000002"


def test_a_validation_that_was_made_later_is_added_to_its_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, 2)
    a_write(store, 2, 2.0)
    a_write(store, 4)
    assert (store.folder / "best").readlink().name == "step-000002"
    path = store.folder / "step-000004"
    store.amend(path, {"figures": {"eval/loss": 1.0}})
    assert store.newest()[:2] == (path, json.loads((path / "manifest.json").read_text()))
    assert (store.folder / "best").readlink().name == "step-000004" == store.best()[0].name
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state-00000.safetensors"]


def test_corrupt_ones_never_push_out_a_complete_one(tmp_path):
    """Steps 4 and 6 are torn, the run goes on from 2: the new checkpoint of step 3 is the newest
    whole one, and stays with 2.
    """
    store = CheckpointStore(tmp_path, 2)
    store.keep = 3
    for step in (2, 4, 6):
        a_write(store, step)
    store.keep = 2
    flip_a_bit(store.folder / "step-000004" / "state-00000.safetensors")
    (store.folder / "step-000006" / "state-00000.safetensors").unlink()
    path, _, remarks = store.newest()
    assert path.name == "step-000002" and [r.split(":")[0] for r in remarks] == [
        "step-000006 passed over",
        "step-000004 passed over",
    ]
    assert steps(store) == [2, 4, 6]  # nothing is deleted before a newer one is whole
    a_write(store, 3)
    assert steps(store) == [2, 3] and store.newest()[0].name == "step-000003"
    a_write(store, 4)
    assert steps(store) == [3, 4] and store.newest()[1]["step"] == 4


def test_a_writer_killed_at_any_instant_leaves_a_whole_one(tmp_path):
    """SIGKILL, 20 times, between any two lines of writing, renaming and tidying up."""
    store, rng, reached = CheckpointStore(tmp_path, 1), random.Random(0), 1
    a_write(store, 1)
    for _ in range(20):
        if not (writer := os.fork()):
            for step in range(reached + 1, 10**6):
                a_write(store, step)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        path, manifest, remarks = CheckpointStore(tmp_path, 1).newest()
        assert (
            path
            and manifest["step"] >= reached
            and not any("step-" in remark for remark in remarks)
        )
        reached = manifest["step"]
    assert reached > 5


def test_a_folder_that_takes_nothing_is_said_each_time_and_every_gather_is_taken_part_in(
    tmp_path, monkeypatch
):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    taken, said = [], []
    module = "loop.checkpoint.checkpointer"
    monkeypatch.setattr(
        f"{module}.gather_full_state", lambda *_: (taken.append(i) or {} for i in range(3))
    )
    monkeypatch.setattr(f"{module}.adam_step", lambda engine: 1)
    monkeypatch.setattr(f"{module}.dist.barrier", lambda: None)
    checkpointer = checkpointer_in(tmp_path)
    checkpointer.plan = None
    logger = SimpleNamespace(flush=lambda: None, say=said.append, scalars=None)
    for step in (5, 6):
        checkpointer.save(None, TrainState(RunConfig(), step=step), logger)
        assert f"checkpoint of step {step} not written" in said[-1] and taken == [0, 1, 2]
        taken.clear()


def test_when_none_is_complete_a_person_must_decide(kept, tmp_path):
    for path in kept.finished():
        (path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="no checkpoint is whole .*step-000006.*run.resume=false"):
        checkpointer_in(tmp_path).find_latest(plan=[])


def test_the_counters_survive_a_manifest_and_too_many_skips_end_a_run():
    """Skips in a row begin anew with a resume; all else is what it was."""
    run = RunConfig(max_skipped_in_a_row=2)
    state = TrainState(run)
    assert state.validation_due and not state.diverged
    for loss, applied in ((1.0, True), (9.0, False), (2.0, True), (8.0, False)):
        state.record(loss, applied)
    assert not state.diverged and state.last_step_skipped and state.eval_metrics == {}
    state.record(7.0, applied=False)
    assert state.diverged
    again = TrainState.from_manifest(run, json.loads(json.dumps(state.to_manifest())))
    assert (again.step, again.skipped_steps, list(again.recent_losses)) == (5, 3, [1.0, 2.0])
    assert not again.diverged and not again.validation_due


def test_validations_are_counted_since_the_best_one():
    run = RunConfig(patience=2)
    state = TrainState(run)
    state.record_validation({"eval/loss": 0.1})  # before the first step: no candidate
    assert state.best is None and not state.validation_due and not state.is_best
    for loss, best_step, count in (
        (3.0, 1, 0),
        (float("nan"), 1, 1),
        (2.0, 3, 0),
        (2.0, 3, 1),  # an equal one is no better
    ):
        state.record(1.0, applied=True)
        assert not state.is_best
        state.record_validation({"eval/loss": loss})
        assert (state.best_step, state.validations_since_best) == (best_step, count)
        assert state.is_best == (count == 0) and not state.ended
    state.record(1.0, applied=True)
    before = state.to_manifest()
    state.record_validation(None)  # interrupted: it stays due and does not count
    assert state.validation_due and state.to_manifest()["best"] == before["best"]
    state.record_validation({})  # without examples
    assert state.to_manifest()["best"] == before["best"]
    state = TrainState.from_manifest(run, json.loads(json.dumps(before)))
    state.record_validation({"eval/loss": 5.0})
    assert state.out_of_patience and state.ended and not state.diverged
    more = TrainState.from_manifest(RunConfig(patience=3), state.to_manifest())
    assert more.best_step == 3 and not more.ended


def test_a_count_by_something_else_begins_anew():
    state = TrainState(RunConfig(), step=1)
    state.record_validation({"eval/loss": 3.0})
    by_notes = Choice("rouge1", "2 notes")
    for manifest in (state.to_manifest(), {"step": 1, "figures": {}}):  # and of older code
        again = TrainState.from_manifest(RunConfig(), manifest, by_notes)
        assert (again.best, again.best_step, again.validations_since_best) == (None, None, 0)
        assert again.to_manifest()["best"]["by"] == "rouge1 of 2 notes"


@pytest.fixture
def restored(tmp_path, monkeypatch):
    """Restores files with these tensors into a model of two weights; returns what it was given."""
    parameters = [("a", SimpleNamespace(ds_shape=(2,))), ("b", SimpleNamespace(ds_shape=(3,)))]
    given = {}
    for name, value in {
        "create_adam_state": lambda engine, step: given.update(step=step),
        "trainable_parameters": lambda module: parameters,
        "tensor_kinds": lambda engine: ("master", "exp_avg"),
        "scatter_full_tensor": lambda p, kind, tensor, ranks: given.update(
            {(p.ds_shape, kind): tensor.tolist()}
        ),
        "set_rng_state": lambda state: given.update(rng=state),
    }.items():
        monkeypatch.setattr(checkpointer_module, name, value)

    def restore(tensors: dict[str, list[float]], rank: int = 0, ranks: int = 2) -> dict:
        given.clear()
        save_file({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "s.safetensors")
        checkpointer = object.__new__(Checkpointer)
        checkpointer.path = tmp_path
        checkpointer.ranks = SimpleNamespace(rank=rank, world_size=ranks)
        rng = ["of rank 0", "of rank 1"]
        checkpointer.manifest = {"files": ["s.safetensors"], "optimizer_step": 7, "rng": rng}
        checkpointer.restore(SimpleNamespace(module=None))
        return given

    return restore


ALL = {"a.master": [1.0, 2], "a.exp_avg": [3.0, 4], "b.master": [5.0] * 3, "b.exp_avg": [6.0] * 3}


def test_every_tensor_is_put_where_it_belongs_and_generators_stay_with_their_rank(restored):
    assert restored(ALL) == {
        "step": 7,
        ((2,), "master"): [1, 2],
        ((2,), "exp_avg"): [3, 4],
        ((3,), "master"): [5] * 3,
        ((3,), "exp_avg"): [6] * 3,
        "rng": "of rank 0",
    }
    assert restored(ALL, rank=1)["rng"] == "of rank 1"
    assert "rng" not in restored(ALL, ranks=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b.master": [5.0] * 4}, "its b.master is not this model's"),
        ({"c.master": [5.0]}, "its c.master is not this model's"),
        ({"b.exp_avg": None}, "has no b.exp_avg"),
    ],
)
def test_tensors_of_another_model_are_named(restored, change, words):
    tensors = {key: value for key, value in (ALL | change).items() if value}
    with pytest.raises(ConfigError, match=words):
        restored(tensors)


@pytest.mark.parametrize("resume", [True, "force"])
def test_a_run_goes_on_with_another_plan_where_that_is_forced(tmp_path, monkeypatch, resume):
    """And a checkpoint that not every rank can read is no checkpoint."""
    a_write(CheckpointStore(tmp_path, 2), 3)
    asked = []

    class Identity:
        def check_compatible(self, path, manifest, plan, force):
            asked.append(force)
            return ["changed"]

    run = RunConfig(resume=resume)
    config = SimpleNamespace(run=run, monitor=SimpleNamespace(best="loss"))
    ranks = SimpleNamespace(is_main=True, all_gather_json=lambda value: [value], any=bool)
    checkpointer = Checkpointer(tmp_path, ranks, config, Identity())
    state = checkpointer.find_latest(plan=None)
    assert asked == [resume == "force"] and state.step == 3
    assert checkpointer.notes == ["changed"] and "resumed from" in checkpointer.start_note
    ranks.any = lambda flag: True  # of another rank
    with pytest.raises(ConfigError, match="not every rank can read it"):
        checkpointer.find_latest(plan=None)


def test_a_spike_is_measured_against_the_last_50_losses():
    state = TrainState(RunConfig(skip_loss_sigmas=2.0))
    for step in range(60):
        state.record(9.0 if step < 10 else 1.0 + step % 2, applied=True)
    assert state.loss_threshold == pytest.approx(1.5 + 2 * 0.5)
    again = TrainState.from_manifest(state.run, json.loads(json.dumps(state.to_manifest())))
    again.record(1.0, applied=True)
    assert len(again.recent_losses) == 50
