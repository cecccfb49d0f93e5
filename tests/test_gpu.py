"""By hand on a GPU machine (`./launch.sh test -m gpu -s`): the proofs of test_train.py with the GPU's kernels at TinyLlama's shape."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_ok
from safetensors.torch import load_file
from test_train import replayed, rounding

from loop.attention import available_backends
from loop.cli import load_config
from loop.data import load_examples
from loop.model import load_tokenizer
from loop.packing import make_plan

pytestmark = pytest.mark.gpu
STEPS = 2
CASES = {"flash_attn": ["attention=flash_attn"], "varlen": ["attention=varlen"],
         "varlen, micro-batches of 2 rows": ["attention=varlen", "micro_batch_size=2"],
         "varlen, checkpointing": ["attention=varlen", "gradient_checkpointing=true"]}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tinyllama, rows, tmp_path_factory):
    """(config, the examples of each step, the record of each case)."""
    folder = tmp_path_factory.mktemp("gpu")
    args = ["--config", "loop/configs/soap_qlora.yaml", f"base={tinyllama}", f"data.train={rows['train']}", "data.valid=null",
            "data.test=null", "data.valid_share=0",
            "monitor.sample_notes=[]", f"run.dir={folder}", "lora.lora_dropout=0.0", "eps=1e-5", "lora.init_lora_weights=false",
            f"max_steps={STEPS}", "run.resume=false", "batch_size=4", "lr=1e-3", "max_grad_norm=0.5"]  # fmt: skip
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
    return config, [[examples[i] for i in plan[s]] for s in range(len(plan))], records


@pytest.mark.parametrize("name", CASES)
def test_real_kernels_add_no_error_to_the_plain_loops_rounding(runs, name):
    config, steps, records = runs
    if name not in records:
        pytest.skip(f"{name} is not installed")
    seen, update = rounding(records[name], steps, config, "cuda"), replayed(records[name], config, STEPS)
    print(f"\n{name}", [{k: f"{a:.1e} ({b:.1e})" for k, (a, b) in figures.items()} for figures in seen], f"update {update:.1e}")
    for figures in seen:
        assert figures["gradient"][0] < 1.5 * figures["gradient"][1] < 0.2
        assert figures["norm"][0] < figures["gradient"][1] and figures["loss"][0] < 0.1 * figures["gradient"][1]
    # An update of some 3e-4 on weights of up to 0.35, whose fp32 steps are 3e-8; the fused AdamW rounds in other places: 4.0e-5 seen.
    assert update < 1e-4
    assert records[name]["frozen"][0] == records[name]["frozen"][1]
