"""The proof of the loop: on any cut over ranks and micro-batches its steps are those of the plainest loop, and mistakes are caught."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_ok
from mistakes import MISTAKES
from reference import reference_model, reference_steps
from safetensors.torch import load_file

from loop.config import load_config
from loop.data import load_examples
from loop.model import load_tokenizer
from loop.optim import cosine_lr
from loop.packing import make_plan

STEPS = 3
EXACT = ["lora.lora_dropout=0.0", "lora.init_lora_weights=false", f"max_steps={STEPS}", "run.resume=false", "max_grad_norm=0.5"]


@pytest.fixture(scope="module")
def bench(tiny_base, rows, tmp_path_factory):
    """Runs cases on 1, 2 and 4 ranks (each world once, all its cases in one process group) and gives their records by name."""
    folder = tmp_path_factory.mktemp("bench")
    fp32 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
    (folder / "fp32.json").write_text(json.dumps(fp32))
    (folder / "config.yaml").write_text(json.dumps({
        "base": tiny_base, "data": {"train": rows["train"]}, "max_seq_len": 512, "batch_size": 4, "lr": 1e-3, "deepspeed": str(folder / "fp32.json"),
        "run": {"dir": str(folder / "runs")},
    }))  # fmt: skip
    base = ["--config", str(folder / "config.yaml"), *EXACT]

    class Bench:
        args = base
        records: dict = {}

        def run(self, world_size: int, cases: list[dict]) -> None:
            todo = [{"out": str(folder / "out"), **c, "args": [*base, *c.get("args", []), f"run.name={c['name']}"]} for c in cases]
            path = folder / f"cases-{world_size}-{cases[0]['name']}.json"
            path.write_text(json.dumps(todo))
            run_ok(world_size, "tests/worker.py", str(path), timeout=600)
            for c in cases:
                out = folder / "out" / c["name"]
                log = [json.loads(line) for line in (folder / "runs" / c["name"] / "metrics.jsonl").read_text().splitlines()]
                loss = [line["train/loss"] for line in log if "train/loss" in line]
                self.records[c["name"]] = json.loads(Path(f"{out}.json").read_text()) | {"tensors": load_file(f"{out}.safetensors"), "loss": loss}

        def reference(self, like: str, method: str = "qlora", dtype=torch.float32) -> list[dict]:
            """The plain loop on the steps of the same plan, from the same initial weights."""
            config = load_config([*base, f"method={method}"])
            examples, _ = load_examples(config, load_tokenizer(config.base), "train")
            plan = make_plan(np.array([len(e) for e in examples]), config.tokens_per_step, config.seed, config.epochs, config.max_steps)
            initial = numbered(self.records[like], "0.weight")
            model = reference_model(config.base, method, config.lora, dtype)
            return reference_steps(model, initial, [[examples[i] for i in plan[s]] for s in range(len(plan))],
                                   lambda step: cosine_lr(step, len(plan), config.lr), weight_decay=config.weight_decay,
                                   max_grad_norm=config.max_grad_norm)  # fmt: skip

    it = Bench()
    it.run(1, [{"name": "1 rank"}, {"name": "micro-batches of 1 row", "args": ["micro_batch_size=1"]},
               {"name": "micro-batches of 2 rows", "args": ["micro_batch_size=2"]}, {"name": "micro-batches of 3 rows", "args": ["micro_batch_size=3"]},
               {"name": "shuffled within the step", "patch": {"shuffle": 1}, "args": ["micro_batch_size=2"]},
               {"name": "reentrant checkpointing", "args": ["gradient_checkpointing=true"]},
               {"name": "non-reentrant checkpointing", "patch": {"non_reentrant": 1}}, {"name": "no leaf modules", "patch": {"no_leaf": 1}},
               {"name": "lora", "args": ["method=lora"]}, {"name": "full", "args": ["method=full"]},
               {"name": "bf16", "args": ["deepspeed=ds_config.json"]}])  # fmt: skip
    it.run(2, [{"name": "2 ranks"}, {"name": "2 ranks, micro-batches of 1 row", "args": ["micro_batch_size=1"]},
               {"name": "2 ranks, lora", "args": ["method=lora"]}, {"name": "2 ranks, full", "args": ["method=full"]},
               {"name": "2 ranks, bf16, checkpointing", "args": ["deepspeed=ds_config.json", "gradient_checkpointing=true"]}])  # fmt: skip
    it.run(4, [{"name": "4 ranks"}, {"name": "4 ranks, micro-batches of 1 row, checkpointing", "args": ["micro_batch_size=1", "gradient_checkpointing=true"]}])
    return it


def numbered(record: dict, prefix: str) -> list[torch.Tensor]:
    return [record["tensors"][f"{prefix}.{i}"] for i in range(len(record["names"]))]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Relative L2 distance over all tensors together; a tensor that is off in direction or scale shows as well as one that is missing."""
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(ours, theirs, strict=True))
    return (difference / sum(b.double().square().sum() for b in theirs)).sqrt().item()


def compare(record: dict, reference: list[dict]) -> dict[str, float]:
    """The largest relative distance over the steps, for everything a step computes. The update is the change of the weights: beside
    the weights themselves it would look small, right or wrong."""
    worst = dict.fromkeys(("loss", "norm", "gradient", "worst tensor", "clipped", "update"), 0.0)
    for step, plain in enumerate(reference):
        before, after = numbered(record, f"{step}.weight"), numbered(record, f"{step + 1}.weight" if step + 1 < len(reference) else "final.weight")
        plain_before = reference[step - 1]["weights"] if step else before
        grads = numbered(record, f"{step}.grad")
        seen = {
            "loss": abs(record["loss"][step] / plain["loss"] - 1),
            "norm": abs(record["norms"][step] / plain["norm"] - 1),
            "gradient": distance(grads, plain["grads"]),
            "worst tensor": max(distance([a], [b]) for a, b in zip(grads, plain["grads"])),
            "clipped": distance(numbered(record, f"{step}.clipped"), plain["clipped"]),
            "update": distance([a - b for a, b in zip(after, before)], [a - b for a, b in zip(plain["weights"], plain_before)]),
        }
        worst = {key: max(worst[key], seen[key]) for key in worst}
    return worst


FP32 = ["1 rank", "micro-batches of 1 row", "micro-batches of 2 rows", "micro-batches of 3 rows", "shuffled within the step", "reentrant checkpointing",
        "non-reentrant checkpointing", "no leaf modules", "2 ranks", "2 ranks, micro-batches of 1 row", "4 ranks",
        "4 ranks, micro-batches of 1 row, checkpointing"]  # fmt: skip


@pytest.fixture(scope="module")
def plain(bench):
    return {"qlora": bench.reference("1 rank"), "lora": bench.reference("lora", "lora"), "full": bench.reference("full", "full")}


@pytest.mark.parametrize("name", FP32)
def test_qlora_steps_are_the_plain_loops(bench, plain, name):
    seen = compare(bench.records[name], plain["qlora"])
    print(name, seen)
    assert max(seen.values()) < 1e-5, seen


@pytest.mark.parametrize("name", ["lora", "2 ranks, lora", "full", "2 ranks, full"])
def test_other_methods_are_the_plain_loops(bench, plain, name):
    seen = compare(bench.records[name], plain[name.split(", ")[-1]])
    print(name, seen)
    assert max(seen.values()) < 1e-5, seen


@pytest.mark.parametrize("name", ["bf16", "2 ranks, bf16, checkpointing"])
def test_bf16_stays_within_rounding(bench, plain, name):
    seen = compare(bench.records[name], plain["qlora"])
    print(name, seen)
    assert seen["loss"] < 1e-2


def test_the_steps_are_worth_comparing(bench, plain):
    """The examples' targets are very unequal, every tensor has a gradient, and clipping bites."""
    assert all(r["norm"] > 0.5 for r in plain["qlora"])
    assert all(g.abs().max() > 0 for r in plain["qlora"] for g in r["grads"])
    config = load_config(bench.args)
    examples, _ = load_examples(config, load_tokenizer(config.base), "train")
    targets = [e.num_targets for e in examples]
    assert max(targets) > 20 * min(targets)
