"""An adapter that is not the one that was trained is found, whichever way it was spoilt.

The right one gives the run's loss to a stranger.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from loop.commands import train
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples
from loop.export import adapter, audit
from loop.export.adapter import save_tokenizer
from loop.export.audit import (
    WEIGHTS,
    AuditError,
    audit_config,
    audit_loss,
    audit_run,
    audit_weights,
    check_adapter,
)
from loop.export.standalone_loss import loss_of
from loop.model.loading import load_tokenizer


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run: its configuration and folder, to be spoilt."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return load_config(["--config", str(trained / "config.yaml"), f"run.dir={tmp_path}"])


def flip(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(tensors: dict) -> str:
    return sorted(tensors)[0]


def spoil_one(change):
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        name = first(tensors)
        save_file(tensors | {name: change(tensors[name].clone()).contiguous()}, path)

    return spoil


def drop(path: Path) -> None:
    tensors = load_file(path)
    del tensors[first(tensors)]
    save_file(tensors, path)


def add(path: Path) -> None:
    save_file(load_file(path) | {"other": torch.ones(1)}, path)


def put(value: float):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (spoil_one(lambda t: t[:0]), "is empty"),
        (drop, "is missing"),
        (add, "other was not trained"),
        (flip, "is not what was trained"),
        (spoil_one(lambda t: t.t()), "trained was"),
        (spoil_one(lambda t: t.float()), "trained was"),
        (spoil_one(put(float("nan"))), "no number"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "cannot be read back"),
        (Path.unlink, "is missing"),
    ],
)
def test_each_fault_of_the_weights_is_found(run, fault, words):
    folder = run.folder / "adapter"
    weights = load_file(folder / WEIGHTS)
    trained = {name: tensor.clone() for name, tensor in weights.items()}
    audit_weights(folder, trained)
    fault(folder / WEIGHTS)
    with pytest.raises(AuditError, match=words):
        audit_weights(folder, trained)


def test_minus_zero_is_not_zero(tmp_path):
    save_file({"w": torch.tensor([0.0])}, tmp_path / WEIGHTS)
    with pytest.raises(AuditError, match="w is not what was trained"):
        audit_weights(tmp_path, {"w": torch.tensor([-0.0])})


def test_a_whole_model_keeps_one_of_two_tied_names(tmp_path):
    weight = torch.ones(2)
    save_file({"embed": weight}, tmp_path / "model.safetensors")
    audit_weights(tmp_path, {"embed": weight, "head": weight})
    with pytest.raises(AuditError, match="head is missing"):
        audit_weights(tmp_path, {"embed": weight, "head": weight.clone()})


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "adapter_config.json",
            {"base_model_name_or_path": "some/other"},
            "names the base some/other",
        ),
        ("adapter_config.json", {"revision": "abc"}, "revision abc"),
        ("adapter_config.json", {"lora_alpha": 99}, "lora_alpha=99"),
        ("trained.json", {"storage": "bfloat16"}, "storage=bfloat16"),
        ("trained.json", {"base_fingerprint": "0"}, "base_fingerprint=0"),
    ],
)
def test_each_fault_of_the_configuration_is_found(run, file, changes, words):
    folder = run.folder / "adapter"
    lora = LoraConfig.from_pretrained(folder)
    audit_config(folder, run, lora)
    rewrite(folder / file, **changes)
    with pytest.raises(AuditError, match=words):
        audit_config(folder, run, lora)


def test_what_is_noted_of_a_run_is_how_it_was_run(run):
    changes = {"method": "lora", "double_quant": False, "max_seq_len": 77}
    noted = audit.provenance(run.model_copy(update=changes), torch.float32, None)
    assert changes.items() <= noted.items()
    assert (noted["storage"], noted["dtype"]) == ("float32", "float32")


def test_a_finished_run_has_been_audited(trained):
    """The fixture's run asked a new process for the loss: no packing, and NF4 quantised anew."""
    report = json.loads((trained / "report.json").read_text())
    noted = report["audit"]
    assert noted["examples"] == 5 and noted["fresh"] == pytest.approx(noted["loss"], rel=5e-3)
    # Here the sample is all of data.valid.
    assert noted["loss"] == pytest.approx(report["eval/loss"], rel=1e-3)
    first_line = (trained / "metrics.jsonl").read_text().splitlines()[0]
    before = json.loads(first_line)["eval/loss"]
    assert noted["fresh"] < 0.97 * before  # an adapter that does nothing would give the first loss
    assert "in a fresh process with PEFT alone" in (trained.parent / "stdout").read_text()
    says = json.loads((trained / "adapter" / "trained.json").read_text())
    assert says["storage"] == "nf4" and says["method"] == "qlora"
    assert says["double_quant"] is True and says["revision"] is None


def test_the_standalone_process_gets_nothing_of_this_project():
    source = Path(audit.__file__).with_name("standalone_loss.py").read_text()
    assert "import loop" not in source and "from loop" not in source and "from ." not in source


def test_a_process_that_was_started_ahead_answers_once_or_is_ended(run):
    examples = load_examples(run, load_tokenizer(run.base), "valid")[0]
    noted = json.loads((run.folder / "report.json").read_text())["audit"]
    audit.start_standalone_process()
    [ahead] = audit._started
    said = audit_loss(run.folder / "adapter", examples[: noted["examples"]], noted["loss"], "cpu")
    assert said["fresh"] == noted["fresh"] and ahead.returncode == 0 and not audit._started
    audit.start_standalone_process()
    [ahead] = audit._started
    audit.stop_standalone_process()
    assert ahead.returncode == -9 and not audit._started


def test_a_loss_that_is_not_the_runs_fails(run, monkeypatch):
    """The files are right for all that a hash can tell; the function is another one."""

    def in_this_process(folder, examples, device, timeout):
        rows = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
        return loss_of(str(folder), device, rows)

    monkeypatch.setattr(audit, "standalone_loss", in_this_process)
    folder = run.folder / "adapter"
    report = json.loads((run.folder / "report.json").read_text())
    examples = load_examples(run, load_tokenizer(run.base), "valid")[0]
    assert (
        audit_loss(folder, examples, report["audit"]["loss"], "cpu")["fresh"]
        == report["audit"]["fresh"]
    )
    rewrite(folder / "adapter_config.json", lora_alpha=0)
    with pytest.raises(
        AuditError, match="a fresh process with transformers and PEFT gets the loss"
    ):
        audit_loss(folder, examples, report["audit"]["loss"], "cpu")


def test_what_keeps_a_fresh_process_from_answering_is_said(run, monkeypatch):
    examples = load_examples(run, load_tokenizer(run.base), "valid")[0]
    late = audit_loss(run.folder / "adapter", examples, 1.0, "cpu", timeout=0.01)
    assert late["fresh"] == "TimeoutExpired"
    assert "was not measured (TimeoutExpired)" in audit.describe_audit(late)
    for code, name, said in (
        (-9, "", "signal 9"),
        (1, "torch.OutOfMemoryError: no", "not enough memory"),
        (1, "ValueError: no", None),
    ):
        monkeypatch.setattr(
            audit.subprocess,
            "Popen",
            lambda *a, **k: Mock(returncode=code, communicate=lambda *a, **k: ("", f"...\n{name}")),
        )
        if said:
            assert said in audit_loss(run.folder, examples, 1.0, "cpu")["fresh"]
        else:
            with pytest.raises(AuditError, match="cannot load it .ValueError: no"):
                audit_loss(run.folder, examples, 1.0, "cpu")


def test_the_command_looks_again(run, monkeypatch):
    report = json.loads((run.folder / "report.json").read_text())
    asked: list[str] = []

    def noted(folder, examples, device, timeout):
        asked[:] = [example.id for example in examples]
        return report["audit"]["fresh"]

    monkeypatch.setattr(audit, "standalone_loss", noted)
    for split in ("train", "valid"):  # the run's loss is of the first ones of one of them
        rewrite(run.folder / "report.json", audit=report["audit"] | {"split": split})
        assert "fresh process with PEFT alone" in audit_run(run)
        assert len(asked) == 5 and all(id.startswith(f"{split}-") for id in asked)
    flip(run.folder / "adapter" / WEIGHTS)
    with pytest.raises(AuditError, match="its hash differs"):
        audit_run(run)
    with pytest.raises(ConfigError, match="train first"):
        audit_run(run.model_copy(update={"run": run.run.model_copy(update={"name": "nowhere"})}))


def test_another_base_of_the_same_name_is_found(run, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    adapter = str(run.folder / "adapter")
    check_adapter(adapter, str(tmp_path / "base"))  # moved, that is all
    flip(tmp_path / "base" / "model.safetensors")
    with pytest.raises(AuditError, match="has another content now"):
        check_adapter(adapter, str(tmp_path / "base"))


def test_a_failed_audit_ends_the_command_with_1(config_file, monkeypatch, capsys):
    def failing(config, ds):
        raise AuditError("the audit of adapter failed")

    monkeypatch.setattr(train, "train", failing)
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", str(config_file)])
    assert ended.value.code == 1 and "error: the audit of adapter failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run_loss", "standalone", "right"),
    [
        (2.0, 2.015, True),
        (2.0, 2.03, False),  # 1.5 %
        (2.0, 1.96, False),
        (0.054, 0.0543, True),  # what was seen
        (0.054, 0.057, False),  # 3 thousandths of a nat, where a hundredth of the loss is less
    ],
)
def test_a_loss_is_right_within_a_hundredth_or_a_thousandth_of_a_nat(
    monkeypatch, run_loss, standalone, right
):
    monkeypatch.setattr(audit, "standalone_loss", lambda *_: standalone)
    if right:
        assert audit_loss(Path("x"), [], run_loss, "cpu")["fresh"] == standalone
    else:
        with pytest.raises(AuditError, match="gets the loss"):
            audit_loss(Path("x"), [], run_loss, "cpu")


@pytest.mark.parametrize(("step_seconds", "first"), [(2.0, 10), (30.0, 0), (0.1, 14)])
def test_the_process_starts_as_long_before_the_end_as_its_imports_take(
    monkeypatch, step_seconds, first
):
    """An evaluation between two steps, here of a minute, makes no step longer."""
    clock, started = [0.0], []
    monkeypatch.setattr(adapter, "start_standalone_process", lambda: started.append(left))
    monkeypatch.setattr(adapter.time, "monotonic", lambda: clock[0])
    adapter._steps_ended.clear()
    config = load_config(["--config", str(ROOT / "loop/configs/embedded.yaml")])
    for left in range(15, -1, -1):
        adapter.prepare_audit(config, SimpleNamespace(is_main=True), left)
        clock[0] += step_seconds + 60 * (left == 12)
    assert started[0] == first


def test_a_tokenizer_that_can_not_be_written_is_an_error_of_the_disk(tmp_path):
    """tokenizers makes a bare Exception of a full disk."""

    def save_pretrained(folder):
        raise Exception("File too large (os error 27)")

    with pytest.raises(OSError, match="the tokenizer: File too large"):
        save_tokenizer(SimpleNamespace(save_pretrained=save_pretrained), tmp_path)
