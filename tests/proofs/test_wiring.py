"""From the configuration to the loop: each key of a run shows in what the run does.

A few tiny runs on two ranks, most keys of them in one. What is expected is written out here and is
not read from the configuration: a wire that is cut between the two would go unnoticed.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_rows
from reference import reference_model, reference_steps
from safetensors.torch import load_file
from test_gradient import Bench, case, distance, numbered

from loop.config.cli import load_config
from loop.data.batch_plan import plan_batches
from loop.data.dataset import load_examples
from loop.memory.estimate import LOSS_CHUNK
from loop.model.loading import load_tokenizer
from loop.model.lora import WEIGHTS

LR, MIN_LR = 2e-3, 5e-4
MIDDLE = (LR + MIN_LR) / 2
# A step of warm-up, a cycle of two steps, the beginning of one of four.
LR_CURVE = [0, LR, MIDDLE, LR, MIN_LR + (LR - MIN_LR) * (1 + math.sqrt(0.5)) / 2, MIDDLE]
STEPS = len(LR_CURVE)
KEYS = [
    "micro_batch_size=1",
    "seed=7",
    "epochs=2",
    f"max_steps={STEPS}",
    f"lr={LR}",
    f"min_lr={MIN_LR}",
    "warmup_steps=1",
    "restart_steps=2",
    "restart_mult=2",
    "betas=[0.5, 0.7]",
    "eps=1e-4",
    "weight_decay=0.5",
    "max_grad_norm=0.3",
    "data.weights=[1.0, 0.25]",
    "double_quant=false",
    "run.save_steps=1",
    "run.keep_checkpoints=3",
    "monitor.eval_steps=4",
    "fused_layers=false",
    "run.deterministic=true",
    "run.max_hours=7",
]
# How the model is run; the numbers stay what they are.
WAYS = [
    "max_steps=1",
    "batch_size=8",
    "micro_batch_size=3",
    "gradient_checkpointing=true",
    "replicate_weights=true",
    "cache_dequantized_weights=false",
    "chunked_loss=true",
    "attention=other",
    "run.export_check_examples=3",
]
# One step holds all examples, and the weights stay where they are.
STILL = [
    "lr=1e-12",
    "min_lr=0",
    "weight_decay=0",
    "epochs=2",
    "data.limit=6",
    "batch_size=8",
    "data.weights=[1.0, 1.0]",
    "max_grad_norm=1e9",
]
LONG = ["max_steps=5", "monitor.eval_steps=3", "run.save_steps=100", "run.resume=true"]
# Each list is run where a test asks for one of its runs.
RUNS = [
    # DeepSpeed would divide by the accumulation steps that it is told of.
    [case("keys", *KEYS, patch={"deepspeed": {"gradient_accumulation_steps": 3}})],
    [
        case(
            "dropout",
            *STILL,
            "lora.lora_dropout=0.3",
            "seed=7",
            "micro_batch_size=1",
            patch={"watch_dropout": 1},
        ),
        case("no dropout", *STILL, "seed=7"),
    ],
    [
        case("whole", *LONG, patch={"draw_numbers": 1}),
        case("stopped", *LONG, patch={"draw_numbers": 1, "stop_after": 3}),
        case("stopped", *LONG, patch={"draw_numbers": 1}),  # and resumed
    ],
    [case("asked", *LONG, "adapter={adapter}", patch={"stop_after": 1})],
    [case("given up", "run.max_skipped_in_a_row=2", patch={"nan_step": 1, "nan_times": 9})],
    [case("spike", "method=lora", patch={"spike_at": 2})],
    [case("ways", *WAYS, patch={"other_attention": "other"})],
    [case("embedding", "embedding_on_cpu=true")],
]


class Wired(Bench):
    """Runs on two ranks, when they are first asked for."""

    def __init__(self, folder: Path, config: dict, adapter: Path) -> None:
        """adapter: of another run; an argument may name it as {adapter}."""
        super().__init__(folder, config)
        self.adapter = adapter

    def record(self, name: str) -> dict:
        """What tests/proofs/worker.py wrote of a run."""
        if name not in self.records:
            cases = next(cases for cases in RUNS if name in [c["name"] for c in cases])
            self.run(2, [c | {"args": [self._fill(arg) for arg in c["args"]]} for c in cases])
        return self.records[name]

    def _fill(self, arg: str) -> str:
        return arg.replace("{adapter}", str(self.adapter))

    def file(self, name: str, path: str) -> str:
        """The text of a file in a run's folder."""
        self.record(name)
        return (self.folder / "runs" / name / path).read_text()


@pytest.fixture(scope="module")
def wired(tiny_base, rows, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wired")
    more = write_rows(folder / "more.jsonl", "more", 12, 3)
    data = {"train": [rows["train"], more], "valid": rows["valid"]}
    config = {"base": tiny_base, "data": data, "max_seq_len": 512, "batch_size": 2}
    return Wired(folder, config, adapter=trained / "adapter")


def manifest(wired: Wired, name: str, checkpoint: str = "newest") -> dict:
    return json.loads(wired.file(name, f"checkpoints/{checkpoint}/manifest.json"))


def metrics(wired: Wired, name: str, key: str) -> dict[int, float]:
    log = wired.file(name, "metrics.jsonl").splitlines()
    return {line["step"]: line[key] for line in map(json.loads, log) if key in line}


def examples_of(wired: Wired):
    config = load_config([*wired.args, "data.weights=[1.0, 0.25]"])
    return load_examples(config, load_tokenizer(config.base), "train")[0]


def plan_of_keys(examples):
    lengths = np.array([len(e) for e in examples])
    weights = np.array([1.0 if e.id.startswith("train-") else 0.25 for e in examples])
    return plan_batches(lengths, 2 * 512, seed=7, epochs=2, max_steps=STEPS, weights=weights)


def test_the_order_follows_seed_epochs_and_weights_of_sources(wired):
    plan = plan_of_keys(examples_of(wired))
    order = hashlib.sha256(plan.order.tobytes()).hexdigest()[:16]
    assert manifest(wired, "keys")["identity"]["plan"]["order of the examples"] == order


def test_the_steps_are_those_of_the_plain_loop_with_these_numbers(wired):
    """Learning rate, betas, eps, decay and clipping; the weights of all micro-batches and ranks."""
    record, examples = wired.record("keys"), examples_of(wired)
    plan = plan_of_keys(examples)
    config = load_config(wired.args)
    plain = reference_steps(
        reference_model(config.base, "qlora", config.lora, double_quant=False),
        numbered(record, "0.weight"),
        [[examples[i] for i in plan[s]] for s in range(STEPS)],
        lambda step: LR_CURVE[step],
        weight_decay=0.5,
        max_grad_norm=0.3,
        betas=(0.5, 0.7),
        eps=1e-4,
    )
    assert list(metrics(wired, "keys", "train/lr").values()) == pytest.approx(LR_CURVE)
    assert record["loss"] == pytest.approx([step["loss"] for step in plain], rel=1e-5)
    assert record["norms"] == pytest.approx([step["norm"] for step in plain], rel=1e-5)
    moved = [
        [a - b for a, b in zip(after, numbered(record, "0.weight"))]
        for after in (numbered(record, "final.weight"), plain[-1]["weights"])
    ]
    assert distance(*moved) < 1e-4


def test_gradients_below_the_norm_stay_as_they_are(wired):
    record = wired.record("no dropout")
    assert max(record["norms"]) < 1e9
    for step in (0, 1):
        grads, clipped = numbered(record, f"{step}.grad"), numbered(record, f"{step}.clipped")
        assert all(torch.equal(a, b) for a, b in zip(grads, clipped))


def test_validations_and_checkpoints_come_when_they_are_due(wired):
    assert list(metrics(wired, "keys", "eval/loss")) == [0, 4, STEPS]  # the last step as well
    figures = wired.record("keys")["report"]
    assert figures["eval/loss"] == metrics(wired, "keys", "eval/loss")[STEPS]
    assert figures["eval/perplexity"] == pytest.approx(math.exp(figures["eval/loss"]))
    folder = wired.folder / "runs" / "keys" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [
        f"step-{step:06d}" for step in (4, 5, 6)
    ]


def test_dropout_is_on_and_has_the_runs_rate_and_seed_and_the_step(wired):
    dropped, plain = wired.record("dropout"), wired.record("no dropout")
    # The weights stay where they are: only another mask can move the loss.
    assert plain["loss"][0] == pytest.approx(plain["loss"][1], rel=1e-6)
    gap = abs(dropped["loss"][0] / plain["loss"][0] - 1)
    assert gap > 1e-4 and abs(dropped["loss"][1] / dropped["loss"][0] - 1) > 1e-4
    assert {(seed, p) for seed, p, _, _ in dropped["drawn"]} == {(7, 0.3)}
    steps = [step for _, _, step, _ in dropped["drawn"]]
    assert steps == sorted(steps) and set(steps) == {0, 1}
    # Every micro-batch has the masks of its own examples.
    of_a_step = [examples for _, _, step, examples in dropped["drawn"] if step == 0]
    assert len(of_a_step) > 1 and all(of_a_step)
    assert len({example for examples in of_a_step for example in examples}) == sum(
        map(len, of_a_step)
    )


def test_the_first_weights_of_lora_follow_the_seed(wired):
    a, b = (numbered(wired.record(name), "0.weight")[0] for name in ("no dropout", "given up"))
    assert not torch.equal(a, b)


def test_one_rank_that_is_asked_stops_all_with_a_checkpoint_and_the_validation_is_made_later(wired):
    assert manifest(wired, "stopped", "step-000003")["step"] == 3  # save_steps is 100
    for key in ("train/loss", "eval/loss"):
        assert metrics(wired, "stopped", key) == metrics(wired, "whole", key)
    assert list(metrics(wired, "stopped", "eval/loss")) == [0, 3, 5]


def test_one_rank_that_is_asked_stops_all_at_the_next_step(wired):
    assert manifest(wired, "asked")["step"] == 1 and len(wired.record("asked")["norms"]) == 1


def test_a_run_starts_with_the_weights_of_the_adapter_that_it_names(wired):
    record = wired.record("asked")
    weights = load_file(wired.adapter / WEIGHTS)
    for name, ours in zip(record["names"], numbered(record, "0.weight"), strict=True):
        assert torch.equal(ours, weights.pop(name.replace(".default", "")).float())
    assert not weights
    digest = json.loads((wired.adapter / "trained.json").read_text())["sha256"]
    assert manifest(wired, "asked")["identity"]["state"]["adapter"] == digest[:16]


def test_a_resumed_runs_generators_go_on_where_they_were(wired):
    """Nothing in a step draws from them; in these runs each step does."""
    whole, resumed = manifest(wired, "whole"), manifest(wired, "stopped")
    assert whole["step"] == resumed["step"] == 5 and whole["rng"] == resumed["rng"]
    assert whole["rng"] != manifest(wired, "stopped", "step-000003")["rng"]
    assert whole["rng"][0] != whole["rng"][1]


def test_a_run_that_is_given_up_has_saved_and_fails(wired):
    record = wired.record("given up")
    assert record["error"].startswith("TrainingDiverged: 2 steps in a row were skipped")
    state = manifest(wired, "given up")
    assert (state["step"], state["skipped"], state["optimizer_step"]) == (2, 2, 0)
    assert len(record["norms"]) == 2 and not record["report"]


def test_a_spike_is_skipped_on_all_ranks(wired):
    """In a run of method=lora, whose base stays as it is."""
    record = wired.record("spike")
    assert len(record["names"]) == 2 * 7 * 3 and all("lora_" in name for name in record["names"])
    before, after = numbered(record, "1.weight"), numbered(record, "2.weight")
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not torch.equal(after[0], numbered(record, "final.weight")[0])
    assert manifest(wired, "spike")["skipped"] == 1


def test_the_model_is_run_as_the_keys_say(wired):
    keys, ways = wired.record("keys")["seen"], wired.record("ways")["seen"]
    assert keys["deterministic"] and not ways["deterministic"]
    assert (keys["max hours"], ways["max hours"]) == (7, None)
    assert "fused" not in keys and ways["fused"] and not ways["copies"]
    assert (keys["max tokens"], ways["max tokens"]) == (512, 3 * 512)
    assert (keys["attention"], ways["attention"]) == ("packed_per_document", "packed_other")
    assert (keys["chunk"], ways["chunk"]) == (None, LOSS_CHUNK)
    assert ways["recomputed"] and not keys["recomputed"]
    assert ways["replicated"] and not keys["replicated"]
    assert wired.record("ways")["report"]["audit"]["examples"] == 3


def test_an_embedding_that_several_ranks_share_cannot_stay_on_the_cpu(wired):
    assert wired.record("embedding")["error"].startswith("ConfigError: embedding_on_cpu=true")
