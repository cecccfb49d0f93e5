"""What is handed out at the end of a run, and on what it is measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loop.config.cli import load_config
from loop.export import adapter
from loop.export.adapter import export_result, write_adapter
from loop.model.loading import load_base
from loop.optim.adamw import trainable_parameters


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("stopping", [True, False])
def test_the_loss_is_measured_on_what_was_held_out_or_trained_on(
    config_file, monkeypatch, held_out, stopping
):
    seen = {}
    monkeypatch.setattr(adapter, "adam_step", lambda engine: 6)
    for name in ("release_graphs", "drop_writer_cache", "stop_standalone_process", "describe_run"):
        monkeypatch.setattr(adapter, name, lambda *args, name=name: seen.update({name: args}))
    monkeypatch.setattr(adapter, "describe_audit", str)
    monkeypatch.setattr(adapter, "evaluate_loss", lambda *args: {"eval/loss": 1.5})
    monkeypatch.setattr(
        adapter, "export_model", lambda *args: (args[-2], {"loss": args[-1]} if args[-2] else {})
    )
    config = load_config(["--config", str(config_file), "run.export_check_examples=2"])
    said = []
    result = export_result(
        SimpleNamespace(module=None),
        config,
        None,
        SimpleNamespace(valid=["v1", "v2", "v3"] if held_out else [], train=["t1", "t2", "t3"]),
        None,
        SimpleNamespace(max_tokens=1024),
        SimpleNamespace(step=6, exported_step=4),
        stopping,
        SimpleNamespace(ranks=SimpleNamespace(is_main=True), say=said.append),
    )
    assert seen["describe_run"][-1] == 4  # the step whose weights they are
    if stopping:
        assert result == {"exported": "[]", "audit": {}} and "stop_standalone_process" in seen
    else:
        sample = ["v1", "v2"] if held_out else ["t1", "t2"]
        audit = {"loss": 1.5, "split": "valid" if held_out else "train"}
        assert result == {"exported": str(sample), "audit": audit}


def test_an_adapter_is_for_use_with_the_bases_revision(config_file, tiny_base, tmp_path):
    config = load_config(["--config", str(config_file), "revision=abc"])
    base = load_base(tiny_base, torch.bfloat16, "cpu", quantization=None)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config.lora))
    state = {name: p.detach() for name, p in trainable_parameters(model)}
    write_adapter(model, state, config, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["inference_mode"] is True and written["revision"] == "abc"
