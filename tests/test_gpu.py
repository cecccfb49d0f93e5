"""By hand on a GPU machine (`./launch.sh test -m gpu -s`): the proofs of test_train.py with the GPU's kernels at TinyLlama's shape."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_ok
from reference import reference_model, reference_steps
from safetensors.torch import load_file
from test_train import compare, numbered

from loop.attention import available_backends
from loop.cli import load_config
from loop.data import load_examples
from loop.model import load_tokenizer
from loop.optim import cosine_lr
from loop.packing import make_plan

pytestmark = pytest.mark.gpu
CASES = {"flash_attn": ["attention=flash_attn"], "varlen": ["attention=varlen"],
         "varlen, micro-batches of 2 rows": ["attention=varlen", "micro_batch_size=2"],
         "varlen, checkpointing": ["attention=varlen", "gradient_checkpointing=true"]}  # fmt: skip


@pytest.fixture(scope="module")
def records(tinyllama, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    args = [f"base={tinyllama}", f"data.train={rows['train']}", "data.valid=null", "monitor.sample_notes=[]", f"run.dir={folder}",
            "lora.lora_dropout=0.0", "eps=1e-5",
            "lora.init_lora_weights=false", "max_steps=2", "run.resume=false", "batch_size=4", "lr=1e-3", "max_grad_norm=0.5"]  # fmt: skip
    args = ["--config", "loop/configs/soap_qlora.yaml", *args]
    found = available_backends("cuda")
    cases = [{"name": name, "args": [*args, *extra, f"run.name={name}"], "out": str(folder / "out")} for name, extra in CASES.items()
             if not found[name.split(",")[0]].startswith("missing")]  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ok(1, "tests/worker.py", str(folder / "cases.json"), gpu=True)
    records = {}
    for case in cases:
        log = [json.loads(line) for line in (folder / case["name"] / "metrics.jsonl").read_text().splitlines()]
        out = folder / "out" / case["name"]
        records[case["name"]] = json.loads(Path(f"{out}.json").read_text()) | {
            "tensors": {k: v.cuda() for k, v in load_file(f"{out}.safetensors").items()},
            "loss": [line["train/loss"] for line in log if "train/loss" in line],
        }  # fmt: skip
    config = load_config(args)
    examples, _ = load_examples(config, load_tokenizer(config.base), "train")
    plan = make_plan(np.array([len(e) for e in examples]), config.tokens_per_step, config.seed, config.epochs, config.max_steps)
    model = reference_model(config.base, "qlora", config.lora, torch.float32, device="cuda")
    initial = numbered(next(iter(records.values())), "0.weight")
    plain = reference_steps(model, initial, [[examples[i] for i in plan[s]] for s in range(len(plan))],
                            lambda step: cosine_lr(step, len(plan), config.lr), weight_decay=config.weight_decay, eps=config.eps,
                            max_grad_norm=config.max_grad_norm)  # fmt: skip
    return records, plain


@pytest.mark.parametrize("name", CASES)
def test_real_kernels_stay_within_rounding_of_the_plain_loop(records, name):
    if name not in records[0]:
        pytest.skip(f"{name} is not installed")
    seen = compare(records[0][name], records[1])
    print(f"\n{name}", {k: f"{v:.1e}" for k, v in seen.items()})
    assert seen["loss"] < 5e-3 and seen["norm"] < 3e-2 and seen["gradient"] < 0.15
    assert records[0][name]["frozen"][0] == records[0][name]["frozen"][1]
