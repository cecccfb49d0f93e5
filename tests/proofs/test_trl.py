"""Against a peer: TRL's SFTTrainer on the same base, examples, order and schedule gives the same
losses, step by step.
"""

import json

import numpy as np
import pytest
from helpers import ROOT, run_ok, write_rows

from loop.config.cli import load_config
from loop.data.dataset import load_examples
from loop.model.loading import load_tokenizer

STEPS, BATCH = 20, 4


@pytest.mark.slow
def test_twenty_steps_follow_trl(tiny_base, tmp_path):
    """fp32, LoRA on the unquantised base (TRL casts a quantised model's adapter to bf16), dropout
    0, no packing there. TRL divides a batch's summed loss by its targets, as we do; so with one
    batch a step the two must agree to rounding.
    """
    pytest.importorskip("trl", reason="TRL is part of the test environment only")
    rows = write_rows(tmp_path / "rows.jsonl", "row", STEPS * BATCH, 3)
    ds = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
    (tmp_path / "fp32.json").write_text(json.dumps(ds))
    config = {
        "base": tiny_base,
        "method": "lora",
        "data": {"train": rows, "valid_fraction": 0},
        "max_seq_len": 1024,
        "batch_size": BATCH,
        "lr": 1e-3,
        "eps": 1e-5,
        "lora": {"lora_dropout": 0.0, "init_lora_weights": False},
        "max_grad_norm": 0.5,
        "deepspeed": str(tmp_path / "fp32.json"),
        "run": {"dir": str(tmp_path), "name": "ours", "export_check_examples": 0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    case = {
        "name": "ours",
        "args": ["--config", str(tmp_path / "config.yaml")],
        "out": str(tmp_path),
        "patch": {"in_order": BATCH},
    }
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    run_ok(2, "tests/proofs/worker.py", str(tmp_path / "cases.json"))
    log = map(json.loads, (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines())
    ours = [line["train/loss"] for line in log if "train/loss" in line]

    c = load_config(["--config", str(tmp_path / "config.yaml")])
    examples, _ = load_examples(c, load_tokenizer(tiny_base), "train")
    spec = {
        "base": tiny_base,
        "lora": c.lora,
        "initial": str(tmp_path / "ours.safetensors"),
        "out": str(tmp_path / "trl"),
        "batch": BATCH,
        "steps": STEPS,
        "lr": c.lr,
        "weight_decay": c.weight_decay,
        "max_grad_norm": c.max_grad_norm,
        "eps": c.eps,
        "examples": [(e.input_ids.tolist(), e.labels.tolist()) for e in examples],
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    theirs = json.loads(
        run_ok(1, "tests/proofs/trl_peer.py", str(tmp_path / "spec.json")).splitlines()[-1]
    )
    print("largest relative difference", np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(ours[0] - ours[-1]) > 0.01  # it learned: agreement is not for want of movement
