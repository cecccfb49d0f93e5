"""DeepSpeed's file may hold what it owns and nothing else."""

import json

import pytest
import torch
from helpers import ROOT

from loop.config.deepspeed import build_ds_config
from loop.config.schema import Config, ConfigError


def load(*overrides: str) -> Config:
    return Config(base="x", data={"train": "x"}, **dict(o.split("=", 1) for o in overrides))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": {}}, "optimizer"),
        ({"gradient_clipping": 1.0}, "max_grad_norm"),
        ({"train_batch_size": 8}, "batch_size"),
        ({"zero_optimization": {"stage": 2}}, "stage"),
        ({"zero_optimization": {}}, "zero_optimization.stage must be 3"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"data_types": {}}, "grad_accum_dtype"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, '"auto"'),
        ({"bf16": {"enabled": "auto", "loss_scale": "auto"}}, '"auto"'),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "qwZ"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, "qwZ"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 0}}, "sub_group_size=0"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 10**400}}, "a smaller number"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": float("nan")}}, "=nan"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine: the loop would not know of it"),
        ({"compile": {"deepcompile": True}}, "compile: the loop"),
        ({"sparse_gradients": True}, "sparse_gradients: the loop"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op must be mean"),
        ({"flops_profiler": {"enabled": "x"}}, "ds.json: "),
        ({"comms_logger": {"x": 1}}, "x=1: unknown key"),
        ({"timers": {"throughput": 5}}, "ds.json: "),
    ],
)
def test_deepspeeds_file_may_not_own_what_the_run_owns(change, words, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads((ROOT / "ds_config.json").read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        build_ds_config(load(f"deepspeed={path}"))
    assert words in str(caught.value)


def test_a_file_of_windows_is_read(tmp_path):
    text = (
        (ROOT / "ds_config.json")
        .read_text()
        .replace('"stage": 3', '"stage": 3, "offload_param": null')
    )
    (tmp_path / "ds.json").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    build_ds_config(load(f"deepspeed={tmp_path / 'ds.json'}"))
    (tmp_path / "ds.json").write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8: save it so"):
        build_ds_config(load(f"deepspeed={tmp_path / 'ds.json'}"))


def test_deepspeed_is_told_not_to_clip():
    assert build_ds_config(load())["gradient_clipping"] == 0.0  # left out, it clips at 1.0


def test_deepspeeds_timer_waits_for_no_gpu_unless_asked(tmp_path):
    assert build_ds_config(load())["timers"] == {"throughput": {"enabled": False}}
    path = tmp_path / "ds.json"
    asked = {"timers": {"throughput": {"enabled": True}}}
    path.write_text(json.dumps(json.loads((ROOT / "ds_config.json").read_text()) | asked))
    assert build_ds_config(load(f"deepspeed={path}"))["timers"] == asked["timers"]


@pytest.mark.parametrize(
    ("instructions", "fast"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({}, False),
    ],
)
def test_auto_computes_in_bf16_where_the_machine_is_fast_in_it(monkeypatch, instructions, fast):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert json.loads((ROOT / "ds_config.json").read_text())["bf16"]["enabled"] == "auto"
    assert build_ds_config(load())["bf16"] == {"enabled": fast}
    assert build_ds_config(load(), for_gpus=True)["bf16"] == {"enabled": True}


def test_a_precision_that_is_written_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    path = tmp_path / "ds.json"
    for enabled in (True, False):
        ds = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": enabled}}
        path.write_text(json.dumps(ds))
        assert build_ds_config(load(f"deepspeed={path}"))["bf16"] == {"enabled": enabled}
