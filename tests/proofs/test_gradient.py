"""The proof of the loop: however a step is split, it is that of the plainest loop.

Split over ranks and micro-batches, that is; and each classic mistake is caught."""

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
from loop.data.batch_plan import plan_run
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
    "data.cache=false",  # a planted mistake must not find a right run's tokens, nor leave its own
]
# Files that Bench writes. Elsewhere the proofs compute in fp32.
BF16, HPZ = "deepspeed=bf16.json", "deepspeed=hpz.json"
FULL_WEIGHTS = "replicate_weights=true"


def case(name: str, *args: str, **more) -> dict:
    return {"name": name, "args": list(args), **more}


ONE_RANK = [
    case("1 rank"),
    case("micro-batches of 1 row", "micro_batch_size=1"),
    case("micro-batches of 3 rows", "micro_batch_size=3"),
    case("shuffled within the step", "micro_batch_size=2", patch={"shuffle": 1}),
    case("reentrant checkpointing", "gradient_checkpointing=true"),
    case("no leaf modules", "fused_layers=false", patch={"no_leaf": 1}),
    case("as PEFT computes it", "fused_layers=false"),
    case("NF4 in each pass", "cache_dequantized_weights=false"),
    case("lora", "method=lora"),
    case("full", "method=full"),
    case("bf16", BF16),
]
SLOW = [
    case("micro-batches of 2 rows", "micro_batch_size=2"),
    case("non-reentrant checkpointing", "gradient_checkpointing=true", patch={"non_reentrant": 1}),
    case("bf16, as PEFT computes it", BF16, "fused_layers=false"),
]
TWO_RANKS = [
    case("2 ranks"),
    case("2 ranks, micro-batches of 1 row", "micro_batch_size=1"),
    case("2 ranks, lora", "method=lora"),
    case("2 ranks, full", "method=full"),
    case("2 ranks, weights whole, full", "method=full", FULL_WEIGHTS),
    case("2 ranks, bf16, checkpointing", BF16, "gradient_checkpointing=true"),
    case("NaN", "replicate_weights=false", patch={"nan_step": 2}),
    case(
        "NaN for ever",
        "run.max_skipped_in_a_row=2",
        FULL_WEIGHTS,
        "optimizer=fused",
        patch={"nan_step": 1, "nan_times": 9},
    ),
    case("spike", FULL_WEIGHTS, "optimizer=plain", patch={"spike_at": 2}),
    case("DeepSpeed clips", "max_grad_norm=1e9", patch={"deepspeed_clips": 0.5}),
    case("quiet", "lora.lora_dropout=0.3"),
]
WATCHED = [
    case(
        name,
        "lora.lora_dropout=0.3",
        "monitor.eval_steps=1",
        "monitor.sample_notes=[valid-1, valid-2, valid-3]",
        "generation.max_new_tokens=8",
        f"replicate_weights={name == 'watched, whole'}",
        patch={"gathered": name == "watched, gathered"},
    )
    for name in ("watched, gathered", "watched, in lockstep", "watched, whole")
]
# The mistakes of each run of the tests: the ones that are nearest to the right step, one that every
# number shows, and one of the data. Of the others the slow tests show that they are caught, too.
QUICK_MISTAKES = (
    "bf16_accumulation",
    "deepspeed_clips_too",
    "forget_world_size",
    "one_document_mask",
    "positions_run_on",
)
PLANTED, SLOW_PLANTED = (
    [
        case(name, *(["max_grad_norm=5"] if name == "deepspeed_clips_too" else []), mistake=name)
        for name in MISTAKES
        if (name in QUICK_MISTAKES) == quick
    ]
    for quick in (True, False)
)
FOUR_RANKS = [
    case("4 ranks, secondary shards in pairs (hpZ)", HPZ),
    case("4 ranks, weights whole, micro-batches of 1 row", "micro_batch_size=1", FULL_WEIGHTS),
    case(
        "4 ranks, micro-batches of 1 row, checkpointing",
        "micro_batch_size=1",
        "gradient_checkpointing=true",
    ),
]


class Bench:
    """Runs cases, all those of a world in one process group, and gives their records by name."""

    def __init__(self, folder: Path, config: dict) -> None:
        self.folder = folder
        self.records: dict[str, dict] = {}
        fp32 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
        zero = fp32["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0  # all of so small a base would stay
        (folder / "fp32.json").write_text(json.dumps(fp32))
        (folder / "bf16.json").write_text(json.dumps(fp32 | {"bf16": {"enabled": True}}))
        pairs = fp32 | {"zero_optimization": zero | {"zero_hpz_partition_size": 2}}
        (folder / "hpz.json").write_text(json.dumps(pairs))
        config = config | {"deepspeed": str(folder / "fp32.json")}
        config["run"] = {"dir": str(folder / "runs"), "export_check_examples": 0}
        (folder / "config.yaml").write_text(json.dumps(config))
        self.args = ["--config", str(folder / "config.yaml"), *EXACT]

    def run(self, world_size: int, cases: list[dict]) -> None:
        files = {arg: arg.replace("=", f"={self.folder}/") for arg in (BF16, HPZ)}
        todo = [
            {
                "out": str(self.folder / "out"),
                **c,
                "args": [
                    *self.args,
                    *(files.get(arg, arg) for arg in c["args"]),
                    f"run.name={c['name']}",
                ],
            }
            for c in cases
        ]
        path = self.folder / f"cases-{world_size}-{cases[0]['name']}.json"
        path.write_text(json.dumps(todo))
        run_ok(world_size, "tests/proofs/worker.py", str(path), seconds=600)
        for c in cases:
            self.records[c["name"]] = self._read(c["name"])

    def _read(self, name: str) -> dict:
        """What worker.py recorded, and the curves of the run's own log."""
        out = self.folder / "out" / name
        log = self.folder / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return json.loads(Path(f"{out}.json").read_text()) | {
            "tensors": load_file(f"{out}.safetensors"),
            "loss": [line["train/loss"] for line in lines if "train/loss" in line],
            "eval/loss": [line["eval/loss"] for line in lines if "eval/loss" in line],
        }

    def planned(self, method: str = "qlora"):
        """(config, the examples of each step)."""
        config = load_config([*self.args, f"method={method}"])
        examples, _ = load_examples(config, load_tokenizer(config.base), "train")
        plan = plan_run(config, np.array([len(e) for e in examples]), None)
        return config, [[examples[i] for i in plan[s]] for s in range(len(plan))]

    def reference(self, like: str, method: str = "qlora", max_grad_norm: float = 0.5) -> list[dict]:
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


@pytest.fixture(scope="module")
def bench(tiny_base, rows, tmp_path_factory):
    """The records of all cases, on 1, 2 and 4 ranks."""
    data = {"train": rows["train"], "valid": rows["valid"]}
    config = {"base": tiny_base, "data": data, "max_seq_len": 512, "batch_size": 4, "lr": 1e-3}
    bench = Bench(tmp_path_factory.mktemp("bench"), config)
    bench.run(1, ONE_RANK)
    bench.run(2, TWO_RANKS + WATCHED + PLANTED)
    bench.run(4, FOUR_RANKS)
    return bench


@pytest.fixture(scope="module")
def slow_bench(bench):
    """Further cases, among the records of the others."""
    bench.run(1, SLOW)
    bench.run(2, SLOW_PLANTED)
    return bench


def numbered(record: dict, prefix: str) -> list[torch.Tensor]:
    return [record["tensors"][f"{prefix}.{i}"] for i in range(len(record["names"]))]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Relative L2 distance over all tensors together: direction, scale, a missing tensor show."""
    difference = sum(
        (a.double() - b.double()).square().sum() for a, b in zip(ours, theirs, strict=True)
    )
    return (difference / sum(b.double().square().sum() for b in theirs)).sqrt().item()


def compare(record: dict, reference: list[dict]) -> dict[str, float]:
    """The largest relative distance over the steps, for everything that a step computes.

    The update is the change of the weights: beside the weights it would look small, right or wrong.
    """
    worst = dict.fromkeys(("loss", "norm", "gradient", "worst tensor", "clipped", "update"), 0.0)
    for step, plain in enumerate(reference):
        last = step + 1 == len(reference)
        before = numbered(record, f"{step}.weight")
        after = numbered(record, "final.weight" if last else f"{step + 1}.weight")
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
    "micro-batches of 3 rows",
    "shuffled within the step",
    "reentrant checkpointing",
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-batches of 2 rows", "non-reentrant checkpointing"])
def test_further_cuts_are_the_plain_loops(slow_bench, plain, name):
    seen = compare(slow_bench.records[name], plain["qlora"])
    print(name, seen)
    assert max(seen.values()) < 1e-5, seen


@pytest.mark.parametrize(
    "name", ["lora", "2 ranks, lora", "full", "2 ranks, full", "2 ranks, weights whole, full"]
)
def test_other_methods_are_the_plain_loops(bench, plain, name):
    seen = compare(bench.records[name], plain[name.split(", ")[-1]])
    print(name, seen)
    # Adam divides by sqrt(v). Where all weights train, some gradients are next to nothing, and
    # rounding decides their update.
    assert seen.pop("update") < 3e-5 and max(seen.values()) < 1e-5, seen


@pytest.mark.slow
def test_compiled_layers_are_the_plain_loops(bench, plain):
    """Each decoder layer's forward compiled. Inductor orders sums anew, which is rounding."""
    bench.run(2, [case("compiled", patch={"compile": 1})])
    seen = compare(bench.records["compiled"], plain["qlora"])
    print("compiled", seen)
    assert seen.pop("update") < 3e-5 and max(seen.values()) < 1e-5, seen


def rounding(
    record: dict, steps: list[list], config, device="cpu"
) -> list[dict[str, tuple[float, float]]]:
    """How far a bf16 run is from the plain loop in fp32, beside the plain loop's own rounding.

    That is how far the plain loop in bf16 is from itself in fp32, and it is the bound for ours.
    Both start each step from the run's own weights, so no step pays for the one before. steps: the
    examples of each step. Returns for each step {metric: (ours, the plain loop's)}.
    """
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
    """Largest relative distance of the run's updates from those of torch's AdamW and clipping.

    Both get the same gradients. What follows the gradient is fp32, whatever the engine computes in.
    """
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


@pytest.mark.parametrize("name", ["bf16", "2 ranks, bf16, checkpointing"])
def test_bf16_adds_no_error_to_the_plain_loops_rounding(bench, name):
    """The bound: the plain loop's own distance from fp32, and half as much for another order."""
    check_bf16(bench, name)


@pytest.mark.slow
def test_bf16_as_peft_computes_it_adds_no_error(slow_bench):
    check_bf16(slow_bench, "bf16, as PEFT computes it")


def check_bf16(bench, name: str) -> None:
    config, steps = bench.planned()
    seen = rounding(bench.records[name], steps, config)
    update = replayed(bench.records[name], config, STEPS)
    print(name, seen, "update", update)
    for metrics in seen:
        ours, plain = metrics["gradient"]
        assert ours < 1.5 * plain < 0.15
        # A single number may round to nothing by chance, so its bound is its gradient's.
        assert metrics["norm"][0] < plain
        assert metrics["loss"][0] < 0.1 * plain
        # Two roundings of one gradient are nearer to each other than either is to fp32.
        both_in_bf16 = metrics["gradient, both in bf16"][0]
        assert both_in_bf16 < plain
        if "PEFT" in name:  # the same terms in nearly the same order; fused layers round elsewhere
            assert both_in_bf16 < 0.02
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
    """It is token-weighted: neither batch size nor ranks matter, and it is the plain loop's."""
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
    """DeepSpeed's `gradient_clipping` at the same norm, ours off: the same weights and norms."""
    ours, theirs = bench.records["2 ranks"], bench.records["DeepSpeed clips"]
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6) and min(ours["norms"]) > 0.5
    moved = [
        [a - b for a, b in zip(numbered(r, "final.weight"), numbered(r, "0.weight"))]
        for r in (ours, theirs)
    ]
    assert distance(*moved) < 1e-4


@pytest.mark.parametrize("way", ["gathered", "in lockstep"])
def test_watching_changes_nothing(bench, way):
    """Evaluation and sample notes in mid-run leave every following step as it was, to the bit.

    With dropout on; whether each rank writes its notes after one gather of the base, of unequal
    lengths and one rank a note more, or in lockstep.
    """
    quiet, watched = bench.records["quiet"], bench.records[f"watched, {way}"]
    assert quiet["loss"] == watched["loss"] and quiet["norms"] == watched["norms"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(numbered(quiet, "final.weight"), numbered(watched, "final.weight"))
    )
    assert len(watched["eval/loss"]) == STEPS + 1
    assert quiet["loss"] != bench.records["2 ranks"]["loss"]  # dropout was on
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


@pytest.mark.parametrize("mistake", [m for m in QUICK_MISTAKES if m != "positions_run_on"])
def test_the_proof_catches(bench, plain, mistake):
    """A classic mistake is far outside the bound that the right loop keeps."""
    check_caught(bench, plain, mistake)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m not in QUICK_MISTAKES])
def test_the_proof_catches_the_others(slow_bench, plain, mistake):
    check_caught(slow_bench, plain, mistake)


def check_caught(bench, plain, mistake: str) -> None:
    right = (
        bench.reference("2 ranks", max_grad_norm=5.0)
        if mistake == "deepspeed_clips_too"
        else plain["qlora"]
    )
    seen = compare(bench.records[mistake], right)
    print(mistake, seen)
    assert max(seen.values()) > 1e-3, seen


def test_positions_that_run_on_show_in_the_row_only(bench, plain):
    """Rotary embeddings see differences of positions alone, so losses and gradients hide this.

    They do until a position exceeds what the base was trained on. So the row itself must be looked
    at, as test_collate.py does.
    """
    seen = compare(bench.records["positions_run_on"], plain["qlora"])
    assert max(seen.values()) < 1e-2, seen
