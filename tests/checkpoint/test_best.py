"""The best validation's weights are exported, its checkpoint stays, and patience ends a run: the
same after an interruption, to the bit.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import bf16_file, run_ok, write_rows
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loop.commands import audit, export, merge, profile, verify_resume
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.export import adapter as adapter_module
from loop.export.audit import AuditError, check_adapter
from loop.export.from_checkpoint import export_checkpoint

RISING = {"0": 0.1, "2": 3.0, "4": 1.0, "6": 2.0, "8": 2.5}  # step 4 is the best after training
NAN = float("nan")


BY_NOTES = ("monitor.best=rouge1", "monitor.best_notes=3")
PATIENT = ("run.patience=2", "max_steps=8")
STAYS_BEST = RISING | {"2": 0.5}


def case(name: str, run: str, *args: str, losses: dict = RISING, **patch) -> dict:
    patch |= {"losses_at": losses} if losses else {}
    return {"name": name, "args": [f"run.name={run}", *args], "patch": patch}


CASES = [
    case("whole", "whole", "run.export_check_examples=4"),
    case("broken 1", "broken", stop_after=3),
    case("broken 2", "broken"),
    case("due 1", "due", stop_after=4),
    case("due 2", "due"),
    case("full", "full", "method=full", "lr=1e-4"),
    case("patience", "patience", *PATIENT, losses=STAYS_BEST),
    case("notes", "notes", *BY_NOTES, losses={}),
]
MORE_CASES = [
    case("last", "last", "run.export=last"),
    case("none", "none", "run.export=none"),
    case("replicated", "replicated", "replicate_weights=true"),
    case("falling", "falling", losses=RISING | {"6": 0.9}),
    case("nan", "nan", losses=RISING | {"2": NAN, "4": 3.0, "6": NAN}),
    case("all nan", "all nan", losses=dict.fromkeys(RISING, NAN)),
    case("disk", "disk", disk_full=1),
    case("patience again", "patience", *PATIENT, losses=STAYS_BEST),
    case("halves 1", "halves", *PATIENT, losses=STAYS_BEST, stop_after=5),
    case("halves 2", "halves", *PATIENT, losses=STAYS_BEST),
    case("more", "more", "run.patience=1", "max_steps=8", losses=STAYS_BEST),
    case("more patience", "more", "run.patience=9", "max_steps=8", losses=STAYS_BEST),
    case("notes 1", "notes halves", *BY_NOTES, losses={}, stop_after=3),
    case("notes 2", "notes halves", *BY_NOTES, losses={}),
]


def start(folder: Path, cases: list[dict]) -> None:
    """Runs the cases on two ranks, one after the other."""
    common = ["--config", str(folder / "config.yaml")]
    todo = [c | {"args": [*common, *c["args"]], "out": str(folder / "out")} for c in cases]
    (folder / "cases.json").write_text(json.dumps(todo))
    run_ok(2, "tests/proofs/worker.py", str(folder / "cases.json"))


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    config = {
        "base": tiny_base,
        "data": {
            "train": write_rows(folder / "train.jsonl", "train", 40, 1),
            "valid": write_rows(folder / "valid.jsonl", "valid", 4, 2),
        },
        "max_seq_len": 512,
        "batch_size": 4,
        "lr": 1e-2,
        "max_steps": 6,
        "deepspeed": bf16_file(folder),
        "run": {"dir": str(folder), "save_steps": 100, "keep_checkpoints": 1, "export": "best"},
        "monitor": {"eval_steps": 2},
        "generation": {"max_new_tokens": 6},
    }
    config["run"]["export_check_examples"] = 0
    (folder / "config.yaml").write_text(json.dumps(config))
    start(folder, CASES)
    return folder


@pytest.fixture(scope="module")
def more_runs(runs) -> Path:
    """The folder of `runs`, with further cases in it."""
    start(runs, MORE_CASES)
    return runs


def record(runs: Path, name: str) -> dict:
    found = json.loads((runs / "out" / f"{name}.json").read_text())
    assert found["error"] is None
    return found


def manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights in bf16, by their names in an export."""
    tensors: dict = {}
    for path in sorted(checkpoint.glob("state-*.safetensors")):
        tensors |= load_file(path)
    return {
        name.removesuffix(".master").replace(".default.", "."): tensor.bfloat16()
        for name, tensor in tensors.items()
        if name.endswith(".master")
    }


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adapter(runs: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(runs / run / "adapter" / "adapter_model.safetensors")


def checkpoints(runs: Path, run: str) -> dict[str, str]:
    """{name: what it links to, or ""}"""
    folder = runs / run / "checkpoints"
    return {p.name: p.readlink().name if p.is_symlink() else "" for p in folder.iterdir()}


def curve(runs: Path, run: str, key: str) -> list:
    lines = map(json.loads, (runs / run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def test_the_best_validation_is_saved_kept_and_exported(runs):
    """Every hundred steps nothing is saved here; the validation before training is no candidate."""
    found = record(runs, "whole")
    assert checkpoints(runs, "whole") == {
        "step-000004": "",
        "step-000006": "",
        "newest": "step-000006",
        "best": "step-000004",
    }
    assert equal(adapter(runs, "whole"), masters(runs / "whole" / "checkpoints" / "best"))
    assert not equal(adapter(runs, "whole"), masters(runs / "whole" / "checkpoints" / "newest"))
    report = found["report"]
    assert report["exported_step"] == 4 and report["steps"] == 6 and report["ended_early"] is None
    by_loss = {"by": "validation loss", "value": 1.0, "step": 4, "validations_since": 1}
    assert report["best"] == by_loss
    assert report["audit"]["fresh"] == pytest.approx(report["audit"]["loss"], rel=1e-2)
    said = "exported    the weights of step 4, the best by validation loss: 1.0000"
    assert said in found["said"]
    assert json.loads((runs / "whole" / "adapter" / "trained.json").read_text())["steps"] == 4


@pytest.mark.parametrize("run", ["broken", "due"])
def test_an_interrupted_run_chooses_as_the_whole_one_to_the_bit(runs, run):
    """Stopped between validations, and in the best one itself, which is then repeated."""
    first, second = record(runs, f"{run} 1"), record(runs, f"{run} 2")
    assert first["report"]["steps"] == {"broken": 3, "due": 4}[run]
    assert first["report"]["exported_step"] == {"broken": 2, "due": 2}[run]
    assert equal(adapter(runs, run), adapter(runs, "whole"))
    assert second["report"]["exported_step"] == 4
    assert second["report"]["best"] == record(runs, "whole")["report"]["best"]
    assert checkpoints(runs, run)["best"] == "step-000004"


@pytest.mark.slow
def test_the_last_ones_weights_and_nothing_are_exported_where_that_is_asked(more_runs):
    assert equal(adapter(more_runs, "last"), masters(more_runs / "last" / "checkpoints" / "newest"))
    report = record(more_runs, "last")["report"]
    assert report["exported_step"] == 6 and report["best"]["step"] == 4
    assert set(checkpoints(more_runs, "last")) == {"step-000006", "newest", "best"}
    assert not (more_runs / "none" / "adapter").exists()
    assert "exported_step" not in record(more_runs, "none")["report"]


@pytest.mark.slow
def test_weights_that_every_rank_holds_are_restored_as_well(more_runs):
    assert record(more_runs, "replicated")["report"]["exported_step"] == 4
    best = more_runs / "replicated" / "checkpoints" / "step-000004"
    assert equal(adapter(more_runs, "replicated"), masters(best))


def test_all_weights_are_restored_with_method_full(runs):
    assert record(runs, "full")["report"]["exported_step"] == 4
    written = load_file(runs / "full" / "model" / "model.safetensors")
    best = masters(runs / "full" / "checkpoints" / "best")
    assert written.keys() <= best.keys()
    assert all(torch.equal(written[name], best[name]) for name in written)


@pytest.mark.slow
def test_where_the_last_one_is_the_best_nothing_is_restored(more_runs):
    report = record(more_runs, "falling")["report"]
    assert report["exported_step"] == 6 and report["best"]["value"] == 0.9
    newest = masters(more_runs / "falling" / "checkpoints" / "newest")
    assert equal(adapter(more_runs, "falling"), newest)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_never_the_best(more_runs):
    report = record(more_runs, "nan")["report"]
    assert report["exported_step"] == 4 and report["best"]["value"] == 3.0
    for run in ("all nan", "disk"):
        found = record(more_runs, run)
        assert found["report"]["exported_step"] == 6
        assert any("no validated checkpoint is there" in line for line in found["said"])


def test_patience_ends_a_run_and_its_report_says_why(runs):
    """Step 2 is the best; the validations of 4 and 6 are not; steps 7 and 8 are not made."""
    found = record(runs, "patience")
    report = found["report"]
    why = "run.patience=2: no better validation loss since step 2"
    assert (report["steps"], report["planned_steps"], report["exported_step"]) == (6, 8, 2)
    assert report["ended_early"] == why and report["best"]["validations_since"] == 2
    assert any(why in line for line in found["said"])
    assert not any("asked to stop" in line for line in found["said"])
    assert equal(adapter(runs, "patience"), masters(runs / "patience" / "checkpoints" / "best"))


@pytest.mark.slow
def test_a_resumed_run_knows_how_long_it_has_waited(more_runs):
    again = record(more_runs, "patience again")
    assert again["report"]["steps"] == 6 and not again["norms"]  # it makes no step
    assert again["report"]["ended_early"] == record(more_runs, "patience")["report"]["ended_early"]
    assert record(more_runs, "halves 1")["report"]["steps"] == 5
    halves = record(more_runs, "halves 2")["report"]
    assert halves["steps"] == 6 and halves["ended_early"] and halves["exported_step"] == 2
    assert equal(adapter(more_runs, "halves"), adapter(more_runs, "patience"))


@pytest.mark.slow
def test_more_patience_takes_a_run_further(more_runs):
    assert record(more_runs, "more")["report"]["steps"] == 4
    report = record(more_runs, "more patience")["report"]
    assert report["steps"] == 8 and report["ended_early"] is None and report["exported_step"] == 2


def test_notes_choose_by_the_metric_that_is_named(runs):
    """They are scored at each validation, also before the first step."""
    found = record(runs, "notes")
    values = curve(runs, "notes", "eval/rouge1")
    assert len(values) == 4 and len(curve(runs, "notes", "eval/sections")) == 4
    best = max(values[1:])
    step = 2 + 2 * values[1:].index(best)  # of equal ones the earliest
    report = found["report"]
    assert report["best"]["by"] == "rouge1 of 3 notes" and report["best"]["value"] == best
    assert report["exported_step"] == step and report["eval/rouge1"] == values[-1]
    checkpoint = runs / "notes" / "checkpoints" / "best"
    assert manifest(checkpoint)["figures"]["eval/rouge1"] == best
    assert manifest(checkpoint)["step"] == step
    assert equal(adapter(runs, "notes"), masters(checkpoint))
    assert any(f"rouge1 of 3 notes {values[0]:.4f}" in line for line in found["said"])
    board = EventAccumulator(str(runs / "notes" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("eval/rouge1")] == [0, 2, 4, 6]
    assert not list((runs / "notes" / "samples").glob("step-*"))  # no note comes into a log


@pytest.mark.slow
def test_an_interrupted_run_chooses_by_notes_as_the_whole_one(more_runs):
    assert record(more_runs, "notes 1")["report"]["steps"] == 3
    for key in ("eval/rouge1", "eval/loss"):
        assert curve(more_runs, "notes halves", key) == curve(more_runs, "notes", key)
    reports = [record(more_runs, name)["report"] for name in ("notes", "notes 2")]
    assert reports[0]["best"] == reports[1]["best"]
    assert equal(adapter(more_runs, "notes halves"), adapter(more_runs, "notes"))


def test_nothing_is_exported_where_none_is_asked_for(config_file, monkeypatch):
    """Neither weights nor a state of the optimizer are looked at."""
    config = load_config(["--config", str(config_file), "run.export=none"])
    monkeypatch.setattr(adapter_module, "release_graphs", lambda model: None)
    monkeypatch.setattr(adapter_module, "adam_step", lambda engine: pytest.fail("it is exported"))
    engine, logger = SimpleNamespace(module=torch.nn.Linear(1, 1)), SimpleNamespace(ranks=None)
    nothing = [None] * 5
    assert adapter_module.export_result(engine, config, *nothing, False, logger) == {}


def test_commands_that_shorten_a_run_need_no_validation(config_file, tmp_path, monkeypatch):
    """`profile` and `train --verify-resume` take the data's validation examples away."""
    choosing = ["run.export=best", "run.patience=1", "monitor.best=rouge1", "monitor.best_notes=2"]
    options = ["--config", str(config_file), *choosing]
    config = load_config([*options, *profile.profiling_options("t")])
    assert config.monitor.best == "loss" and config.run.patience is None

    def stop(folder, name, options, *short):
        raise KeyboardInterrupt(load_config([*options, *short]).run.export)

    monkeypatch.setattr(verify_resume, "launch", stop)
    with pytest.raises(KeyboardInterrupt, match="last"):
        verify_resume.verify(load_config(options), options, tmp_path)


# ------------------------------------------------------------------ a checkpoint as an adapter


def test_a_checkpoint_is_exported_as_the_run_exported_it(runs, tmp_path, capsys):
    out = tmp_path / "adapter"
    export.main(["--checkpoint", str(runs / "whole" / "checkpoints" / "best"), "--out", str(out)])
    assert "exported the weights of step 4" in capsys.readouterr().out
    written = runs / "whole" / "adapter"
    assert {p.name for p in out.iterdir()} == {p.name for p in written.iterdir()}
    assert equal(load_file(out / "adapter_model.safetensors"), adapter(runs, "whole"))
    for name in ("adapter_config.json", "trained.json"):
        mine, runs_own = (json.loads((folder / name).read_text()) for folder in (out, written))
        if name == "adapter_config.json":  # PEFT keeps the names in a set
            assert set(mine.pop("target_modules")) == set(runs_own.pop("target_modules"))
        else:  # others may commit meanwhile
            mine["versions"].pop("commit"), runs_own["versions"].pop("commit")
        assert mine == runs_own, name
    check_adapter(str(out))
    folder, step = export_checkpoint(
        str(runs / "whole" / "checkpoints" / "newest"), str(tmp_path / "last")
    )
    assert step == 6 and not equal(load_file(folder / "adapter_model.safetensors"), masters(out))


def test_a_checkpoint_whose_base_has_changed_is_not_exported(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("loop.export.audit.base_fingerprint", lambda *args: "another")
    out = tmp_path / "adapter"
    with pytest.raises(AuditError, match="which has another content now"):
        export_checkpoint(str(runs / "whole" / "checkpoints" / "best"), str(out))
    assert not out.exists()


def test_a_checkpoint_of_method_full_is_exported_as_a_model(runs, tmp_path):
    checkpoint = runs / "full" / "checkpoints" / "best"
    folder, _ = export_checkpoint(str(checkpoint), str(tmp_path / "model"))
    written = load_file(runs / "full" / "model" / "model.safetensors")
    assert equal(load_file(folder / "model.safetensors"), written)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, runs / "full/model")]
    assert configs[0]["dtype"] == configs[1]["dtype"] == "bfloat16"


def test_a_checkpoint_is_merged_as_its_adapter_is(runs, tmp_path):
    outs = [str(tmp_path / name) for name in ("one", "other")]
    merge.main(
        ["--checkpoint", str(runs / "whole" / "checkpoints" / "step-000004"), "--out", outs[0]]
    )
    merge.main(["--adapter", str(runs / "whole" / "adapter"), "--out", outs[1]])
    one, other = (load_file(Path(out) / "model.safetensors") for out in outs)
    assert equal(one, other)
    with pytest.raises(SystemExit):
        merge.parse_arguments(["--checkpoint", "x", "--adapter", "y", "--out", "z"])


def test_a_checkpoint_is_audited_by_its_validation_loss(runs, tmp_path, capsys):
    """The notes' run has the losses that were measured; another loss is found."""
    checkpoint = str(runs / "notes" / "checkpoints" / "newest")
    audit.main(["--checkpoint", checkpoint])
    assert "in a fresh process with PEFT alone" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:  # its validation loss was made up
        audit.main(["--checkpoint", str(runs / "whole" / "checkpoints" / "best")])
    assert "the run 1.0000" in str(ended.value.code)
    with pytest.raises(SystemExit) as ended:
        audit.main(["--checkpoint", checkpoint, "lr=1"])
    assert ended.value.code == 2


def test_what_is_no_checkpoint_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="is no checkpoint; give runs/NAME"):
        export_checkpoint(str(runs / "whole"), str(tmp_path / "out"))
    torn = tmp_path / "run" / "checkpoints" / "step-000004"
    torn.mkdir(parents=True)
    for path in (runs / "whole" / "checkpoints" / "step-000004").iterdir():
        (torn / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="has no config.yaml"):
        export_checkpoint(str(torn), str(tmp_path / "out"))
    for name in ("config.yaml", "ds_config.json"):
        (tmp_path / "run" / name).write_bytes((runs / "whole" / name).read_bytes())
    with open(torn / "state-00000.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(AuditError, match="is not what was written"):
        export_checkpoint(str(torn), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
