"""The proof of the loop: on any cut over ranks and micro-batches its steps are those of the plainest loop, and mistakes are caught."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_ok
from mistakes import MISTAKES
from reference import reference_model, reference_steps
from safetensors.torch import load_file

from loop.config.cli import load_config
from loop.data.batch_plan import plan_batches
from loop.data.dataset import load_examples
from loop.model.loading import load_tokenizer
from loop.optim.schedule import cosine_lr

STEPS = 3
EXACT = [
    "lora.lora_dropout=0.0",
    "lora.init_lora_weights=false",
    f"max_steps={STEPS}",
    "run.resume=false",
    "max_grad_norm=0.5",
    "eps=1e-5",
    "data.cache=false",
]  # planted mistakes must not find a right run's tokens, nor leave theirs


@pytest.fixture(scope="module")
def bench(tiny_base, rows, tmp_path_factory):
    """Runs cases on 1, 2 and 4 ranks (each world once, all its cases in one process group) and gives their records by name."""
    folder = tmp_path_factory.mktemp("bench")
    fp32 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
    fp32["zero_optimization"]["stage3_param_persistence_threshold"] = (
        0  # the base is so small that all of it would stay
    )
    (folder / "fp32.json").write_text(json.dumps(fp32))
    (folder / "hpz.json").write_text(
        json.dumps(
            fp32 | {"zero_optimization": fp32["zero_optimization"] | {"zero_hpz_partition_size": 2}}
        )
    )
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "base": tiny_base,
                "data": {"train": rows["train"], "valid": rows["valid"]},
                "max_seq_len": 512,
                "batch_size": 4,
                "lr": 1e-3,
                "deepspeed": str(folder / "fp32.json"),
                "run": {"dir": str(folder / "runs"), "export_check_examples": 0},
            }
        )
    )
    base = ["--config", str(folder / "config.yaml"), *EXACT]

    class Bench:
        args = base
        records: dict = {}

        def run(self, world_size: int, cases: list[dict]) -> None:
            todo = [
                {
                    "out": str(folder / "out"),
                    **c,
                    "args": [*base, *c.get("args", []), f"run.name={c['name']}"],
                }
                for c in cases
            ]
            path = folder / f"cases-{world_size}-{cases[0]['name']}.json"
            path.write_text(json.dumps(todo))
            run_ok(world_size, "tests/proofs/worker.py", str(path), timeout=600)
            for c in cases:
                out = folder / "out" / c["name"]
                log = [
                    json.loads(line)
                    for line in (folder / "runs" / c["name"] / "metrics.jsonl")
                    .read_text()
                    .splitlines()
                ]
                curves = {
                    key.split("/")[1] if key == "train/loss" else key: [
                        line[key] for line in log if key in line
                    ]
                    for key in ("train/loss", "eval/loss")
                }
                self.records[c["name"]] = (
                    json.loads(Path(f"{out}.json").read_text())
                    | {"tensors": load_file(f"{out}.safetensors")}
                    | curves
                )

        def planned(self, method: str = "qlora"):
            """(config, the examples of each step)."""
            config = load_config([*base, f"method={method}"])
            examples, _ = load_examples(config, load_tokenizer(config.base), "train")
            plan = plan_batches(
                np.array([len(e) for e in examples]),
                config.tokens_per_step,
                config.seed,
                config.epochs,
                config.max_steps,
            )
            return config, [[examples[i] for i in plan[s]] for s in range(len(plan))]

        def reference(
            self, like: str, method: str = "qlora", max_grad_norm: float = 0.5
        ) -> list[dict]:
            """The plain loop on the steps of the same plan, from the same initial weights."""
            config, steps = self.planned(method)
            return reference_steps(
                reference_model(config.base, method, config.lora),
                numbered(self.records[like], "0.weight"),
                steps,
                lambda step: cosine_lr(step, len(steps), config.lr),
                weight_decay=config.weight_decay,
                eps=config.eps,
                max_grad_norm=max_grad_norm,
            )

    it = Bench()
    it.run(
        1,
        [
            {"name": "1 rank"},
            {"name": "micro-batches of 1 row", "args": ["micro_batch_size=1"]},
            {"name": "micro-batches of 2 rows", "args": ["micro_batch_size=2"]},
            {"name": "micro-batches of 3 rows", "args": ["micro_batch_size=3"]},
            {
                "name": "shuffled within the step",
                "patch": {"shuffle": 1},
                "args": ["micro_batch_size=2"],
            },
            {"name": "reentrant checkpointing", "args": ["gradient_checkpointing=true"]},
            {
                "name": "non-reentrant checkpointing",
                "patch": {"non_reentrant": 1},
                "args": ["gradient_checkpointing=true"],
            },
            {"name": "no leaf modules", "patch": {"no_leaf": 1}, "args": ["fused_layers=false"]},
            {"name": "as PEFT computes it", "args": ["fused_layers=false"]},
            {"name": "NF4 in each pass", "args": ["cache_dequantized_weights=false"]},
            {"name": "lora", "args": ["method=lora"]},
            {"name": "full", "args": ["method=full"]},
            {"name": "bf16", "args": ["deepspeed=ds_config.json"]},
            {
                "name": "bf16, as PEFT computes it",
                "args": ["deepspeed=ds_config.json", "fused_layers=false"],
            },
        ],
    )
    mistakes = [
        {"name": m, "mistake": m, "args": ["max_grad_norm=5"] if m == "deepspeed_clips_too" else []}
        for m in MISTAKES
    ]
    it.run(
        2,
        [
            {"name": "2 ranks"},
            {"name": "2 ranks, micro-batches of 1 row", "args": ["micro_batch_size=1"]},
            {"name": "2 ranks, lora", "args": ["method=lora"]},
            {"name": "2 ranks, full", "args": ["method=full"]},
            {
                "name": "2 ranks, weights whole, full",
                "args": ["method=full", "replicate_weights=true"],
            },
            {
                "name": "2 ranks, bf16, checkpointing",
                "args": ["deepspeed=ds_config.json", "gradient_checkpointing=true"],
            },
            {"name": "NaN", "patch": {"nan_step": 2}, "args": ["replicate_weights=false"]},
            {
                "name": "NaN for ever",
                "patch": {"nan_step": 1, "nan_times": 9},
                "args": ["run.max_skipped_in_a_row=2", "replicate_weights=true", "optimizer=fused"],
            },
            {
                "name": "spike",
                "patch": {"spike_at": 2},
                "args": ["replicate_weights=true", "optimizer=plain"],
            },
            {
                "name": "DeepSpeed clips",
                "patch": {"deepspeed_clips": 0.5},
                "args": ["max_grad_norm=1e9"],
            },
            {"name": "quiet", "args": ["lora.lora_dropout=0.3"]},
            *(
                {
                    "name": name,
                    "patch": {"gathered": name == "watched, gathered"},
                    "args": [
                        "lora.lora_dropout=0.3",
                        "monitor.eval_steps=1",
                        "monitor.sample_notes=[valid-1, valid-2, valid-3]",
                        "monitor.sample_max_new_tokens=8",
                        f"replicate_weights={name == 'watched, whole'}",
                    ],
                }
                for name in ("watched, gathered", "watched, in lockstep", "watched, whole")
            ),
            *mistakes,
        ],
    )
    it.run(
        4,
        [
            {
                "name": "4 ranks, secondary shards in pairs (hpZ)",
                "args": [f"deepspeed={folder / 'hpz.json'}"],
            },
            {
                "name": "4 ranks, weights whole, micro-batches of 1 row",
                "args": ["micro_batch_size=1", "replicate_weights=true"],
            },
            {
                "name": "4 ranks, micro-batches of 1 row, checkpointing",
                "args": ["micro_batch_size=1", "gradient_checkpointing=true"],
            },
        ],
    )
    return it


def numbered(record: dict, prefix: str) -> list[torch.Tensor]:
    return [record["tensors"][f"{prefix}.{i}"] for i in range(len(record["names"]))]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Relative L2 distance over all tensors together; a tensor that is off in direction or scale shows as well as one that is missing."""
    difference = sum(
        (a.double() - b.double()).square().sum() for a, b in zip(ours, theirs, strict=True)
    )
    return (difference / sum(b.double().square().sum() for b in theirs)).sqrt().item()


def compare(record: dict, reference: list[dict]) -> dict[str, float]:
    """The largest relative distance over the steps, for everything a step computes. The update is the change of the weights: beside
    the weights themselves it would look small, right or wrong."""
    worst = dict.fromkeys(("loss", "norm", "gradient", "worst tensor", "clipped", "update"), 0.0)
    for step, plain in enumerate(reference):
        before, after = (
            numbered(record, f"{step}.weight"),
            numbered(record, f"{step + 1}.weight" if step + 1 < len(reference) else "final.weight"),
        )
        plain_before = reference[step - 1]["weights"] if step else before
        grads = numbered(record, f"{step}.grad")
        seen = {
            "loss": abs(record["loss"][step] / plain["loss"] - 1),
            "norm": abs(record["norms"][step] / plain["norm"] - 1),
            "gradient": distance(grads, plain["grads"]),
            "worst tensor": max(distance([a], [b]) for a, b in zip(grads, plain["grads"])),
            "clipped": distance(numbered(record, f"{step}.clipped"), plain["clipped"]),
            "update": distance(
                [a - b for a, b in zip(after, before)],
                [a - b for a, b in zip(plain["weights"], plain_before)],
            ),
        }
        worst = {key: max(worst[key], seen[key]) for key in worst}
    return worst


FP32 = [
    "1 rank",
    "micro-batches of 1 row",
    "micro-batches of 2 rows",
    "micro-batches of 3 rows",
    "shuffled within the step",
    "reentrant checkpointing",
    "non-reentrant checkpointing",
    "no leaf modules",
    "as PEFT computes it",
    "NF4 in each pass",
    "2 ranks",
    "2 ranks, micro-batches of 1 row",
    "4 ranks, weights whole, micro-batches of 1 row",
    "4 ranks, secondary shards in pairs (hpZ)",
    "4 ranks, micro-batches of 1 row, checkpointing",
]


@pytest.fixture(scope="module")
def plain(bench):
    return {
        "qlora": bench.reference("1 rank"),
        "lora": bench.reference("lora", "lora"),
        "full": bench.reference("full", "full"),
    }


@pytest.mark.parametrize("name", FP32)
def test_qlora_steps_are_the_plain_loops(bench, plain, name):
    seen = compare(bench.records[name], plain["qlora"])
    print(name, seen)
    assert max(seen.values()) < 1e-5, seen


@pytest.mark.parametrize(
    "name", ["lora", "2 ranks, lora", "full", "2 ranks, full", "2 ranks, weights whole, full"]
)
def test_other_methods_are_the_plain_loops(bench, plain, name):
    seen = compare(bench.records[name], plain[name.split(", ")[-1]])
    print(name, seen)
    # Adam divides by sqrt(v): where all weights train, some of their gradients are next to nothing and rounding decides their update
    assert seen.pop("update") < 3e-5 and max(seen.values()) < 1e-5, seen


@pytest.mark.slow
def test_compiled_layers_are_the_plain_loops(bench, plain):
    """Each decoder layer's forward compiled, as a run may do; inductor orders sums anew, which is rounding."""
    bench.run(2, [{"name": "compiled", "patch": {"compile": 1}}])
    seen = compare(bench.records["compiled"], plain["qlora"])
    print("compiled", seen)
    assert seen.pop("update") < 3e-5 and max(seen.values()) < 1e-5, seen


def rounding(
    record: dict, steps: list[list], config, device="cpu"
) -> list[dict[str, tuple[float, float]]]:
    """How far a bf16 run is from the plain loop in fp32, and beside it how far the plain loop is from itself when it runs in bf16: that
    is the rounding, and the bound for ours. Both start each step from the run's own weights, so no step pays for the one before.
    steps: the examples of each step. Returns for each step {figure: (ours, the plain loop's)}, relative distances."""
    plain = {
        dtype: reference_model(config.base, config.method, config.lora, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
    }
    seen = []
    for at, examples in enumerate(steps):
        weights = numbered(record, f"{at}.weight")
        exact, rounded = (
            reference_steps(
                model, weights, [examples], lambda _: 0.0, weight_decay=0.0, max_grad_norm=1e9
            )[0]
            for model in plain.values()
        )
        seen.append(
            {
                "loss": (
                    abs(record["loss"][at] / exact["loss"] - 1),
                    abs(rounded["loss"] / exact["loss"] - 1),
                ),
                "norm": (
                    abs(record["norms"][at] / exact["norm"] - 1),
                    abs(rounded["norm"] / exact["norm"] - 1),
                ),
                "gradient": (
                    distance(numbered(record, f"{at}.grad"), exact["grads"]),
                    distance(rounded["grads"], exact["grads"]),
                ),
                "gradient, both in bf16": (
                    distance(numbered(record, f"{at}.grad"), rounded["grads"]),
                    0.0,
                ),
            }
        )
    return seen


def replayed(record: dict, config, num_steps: int) -> float:
    """Largest relative distance of the run's updates from those that torch's AdamW makes of the same gradients, clipped by torch. What
    follows the gradient is fp32 whatever the engine computes in, so this is exact."""
    weights = [w.clone().requires_grad_() for w in numbered(record, "0.weight")]
    optimizer = torch.optim.AdamW(
        weights, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    worst = 0.0
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, num_steps, config.lr)
        before = [w.detach().clone() for w in weights]
        for w, grad in zip(weights, numbered(record, f"{step}.grad"), strict=True):
            w.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        after = numbered(record, f"{step + 1}.weight" if step + 1 < num_steps else "final.weight")
        worst = max(
            worst,
            distance(
                [a - b for a, b in zip(after, before)],
                [w.detach() - b for w, b in zip(weights, before)],
            ),
        )
    return worst


@pytest.mark.parametrize(
    "name", ["bf16", "bf16, as PEFT computes it", "2 ranks, bf16, checkpointing"]
)
def test_bf16_adds_no_error_to_the_plain_loops_rounding(bench, name):
    """The bound is the plain loop's own distance between bf16 and fp32, half as much again for sums in another order."""
    config, steps = bench.planned()
    seen, update = (
        rounding(bench.records[name], steps, config),
        replayed(bench.records[name], config, STEPS),
    )
    print(name, seen, "update", update)
    for figures in seen:
        assert figures["gradient"][0] < 1.5 * figures["gradient"][1] < 0.15
        # a single number may round to nothing by chance: its bound is the gradient's, which it is made of
        assert (
            figures["norm"][0] < figures["gradient"][1]
            and figures["loss"][0] < 0.1 * figures["gradient"][1]
        )
        assert (
            figures["gradient, both in bf16"][0] < figures["gradient"][1]
        )  # two roundings of one gradient: nearer than either to fp32
        if (
            "PEFT" in name
        ):  # the same terms in nearly the same order; fused layers round less often, and elsewhere
            assert figures["gradient, both in bf16"][0] < 0.02
    assert update < 1e-5


def test_the_steps_are_worth_comparing(bench, plain):
    """The examples' targets are very unequal, every tensor has a gradient, and clipping bites."""
    assert all(r["norm"] > 0.5 for r in plain["qlora"])
    assert all(g.abs().max() > 0 for r in plain["qlora"] for g in r["grads"])
    config = load_config(bench.args)
    examples, _ = load_examples(config, load_tokenizer(config.base), "train")
    targets = [e.num_targets for e in examples]
    assert max(targets) > 20 * min(targets)


def test_only_lora_moves_and_all_of_it_does(bench):
    for name, record in bench.records.items():
        assert record["frozen"][0] == record["frozen"][1], (
            f"{name}: a frozen weight or a quantisation state changed"
        )
    record = bench.records["2 ranks"]
    assert len(record["names"]) == 2 * 7 * 3 and all("lora_" in name for name in record["names"])
    for before, after in zip(numbered(record, "0.weight"), numbered(record, "final.weight")):
        assert not torch.equal(before, after)


def test_evaluation_is_the_same_for_any_cut(bench):
    """Token-weighted, so it depends neither on the batch size nor on the number of ranks; and it is what the plain loop gives."""
    starts = {name: bench.records[name]["eval/loss"][0] for name in FP32}
    assert max(starts.values()) - min(starts.values()) < 1e-6 * starts["1 rank"], starts
    config = load_config(bench.args)
    examples, _ = load_examples(config, load_tokenizer(config.base), "valid")
    model = reference_model(config.base, "qlora", config.lora)
    plain = reference_steps(
        model,
        numbered(bench.records["1 rank"], "0.weight"),
        [examples],
        lambda step: 0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    assert starts["1 rank"] == pytest.approx(plain[0]["loss"], rel=1e-5)


def test_our_clipping_is_deepspeeds(bench):
    """DeepSpeed's own `gradient_clipping` at the same norm, ours switched off: the same weights after three steps, and the same norms."""
    ours, theirs = bench.records["2 ranks"], bench.records["DeepSpeed clips"]
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6) and min(ours["norms"]) > 0.5
    moved = [
        [a - b for a, b in zip(numbered(r, "final.weight"), numbered(r, "0.weight"))]
        for r in (ours, theirs)
    ]
    assert distance(*moved) < 1e-4


@pytest.mark.parametrize("way", ["gathered", "in lockstep"])
def test_watching_changes_nothing(bench, way):
    """Evaluation and sample notes in mid-run leave every following step as it was, to the bit, with dropout on: whether the ranks write
    their shares after one gather of the base, of unequal lengths and one rank a note more, or in lockstep."""
    quiet, watched = bench.records["quiet"], bench.records[f"watched, {way}"]
    assert quiet["loss"] == watched["loss"] and quiet["norms"] == watched["norms"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(numbered(quiet, "final.weight"), numbered(watched, "final.weight"))
    )
    assert (
        len(watched["eval/loss"]) == STEPS + 1 and quiet["loss"] != bench.records["2 ranks"]["loss"]
    )  # dropout was on
    samples = [
        load_config(bench.args).folder.parent / f"watched, {w}" / "samples"
        for w in ("gathered", "in lockstep", "whole")
    ]
    written = [
        [path.read_text() for path in sorted(folder.glob("step-*.md"))] for folder in samples
    ]
    assert (
        written[0] == written[1] == written[2]
        and len(written[0]) == STEPS + 1
        and all(note.count("## valid-") == 3 for note in written[0])
    )


def test_nan_on_one_rank_skips_the_step_on_all(bench):
    record = bench.records["NaN"]
    assert math.isnan(record["norms"][1]) and all(math.isfinite(record["norms"][i]) for i in (0, 2))
    before, after = numbered(record, "1.weight"), numbered(record, "2.weight")
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not all(torch.equal(a, b) for a, b in zip(after, numbered(record, "final.weight")))
    spike = bench.records["spike"]
    assert all(
        torch.equal(a, b) for a, b in zip(numbered(spike, "1.weight"), numbered(spike, "2.weight"))
    )
    assert all(math.isfinite(n) for n in spike["norms"]) and any(
        "step 2: loss" in line and "skipped" in line for line in spike["said"]
    )
    assert (
        "2 steps in a row" in bench.records["NaN for ever"]["error"]
        and len(bench.records["NaN for ever"]["norms"]) == 2
    )


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m != "positions_run_on"])
def test_the_proof_catches(bench, plain, mistake):
    """Each classic mistake is far outside the bound that the right loop keeps."""
    right = (
        bench.reference("2 ranks", max_grad_norm=5.0)
        if mistake == "deepspeed_clips_too"
        else plain["qlora"]
    )
    seen = compare(bench.records[mistake], right)
    print(mistake, seen)
    assert max(seen.values()) > 1e-3, seen


def test_positions_that_run_on_show_in_the_row_only(bench, plain):
    """Rotary embeddings see differences of positions alone, so this mistake hides from losses and gradients (until a position
    exceeds what the base was trained on): the row itself must be looked at, as test_collate.py does."""
    seen = compare(bench.records["positions_run_on"], plain["qlora"])
    assert max(seen.values()) < 1e-2, seen
