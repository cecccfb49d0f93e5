"""Clipping, the learning rate and the parameter groups. Clipping over real partitions is held against the plain loop in test_train.py."""

import math
import warnings

import pytest
import torch
from helpers import run_ok

from loop.config.schema import Config
from loop.optim.adamw import build_optimizer
from loop.optim.schedule import cosine_lr, set_lr
from loop.optim.skip import loss_spike_threshold

PLAIN = {"base": "x", "data": {"train": "x"}}


def torch_curve(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = make(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    return seen


@pytest.mark.parametrize("steps", [1, 2, 7, 826])
@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_cosine_is_torchs_cosine_annealing(steps, min_lr):
    theirs = torch_curve(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps, min_lr), steps
    )
    assert [cosine_lr(s, steps, 0.1, min_lr=min_lr) for s in range(steps)] == pytest.approx(
        theirs, abs=1e-12
    )


@pytest.mark.parametrize(("first", "mult"), [(10, 1), (10, 2), (3, 3), (1, 1)])
def test_restarts_are_torchs_warm_restarts(first, mult):
    theirs = torch_curve(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, first, mult, 0.001), 200
    )
    assert [
        cosine_lr(s, 200, 0.1, min_lr=0.001, restart_steps=first, restart_mult=mult)
        for s in range(200)
    ] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_warm_up_is_transformers(warmup):
    from transformers import get_cosine_schedule_with_warmup

    theirs = torch_curve(lambda o: get_cosine_schedule_with_warmup(o, warmup, 100), 100)
    assert [cosine_lr(s, 100, 0.1, warmup_steps=warmup) for s in range(100)] == pytest.approx(
        theirs, abs=1e-12
    )


def test_the_curve_starts_at_lr_and_ends_near_min_lr():
    assert cosine_lr(0, 826, 1e-4) == 1e-4
    assert cosine_lr(1, 826, 1e-4) == pytest.approx(9.99e-5, rel=1e-3)
    assert 0 < cosine_lr(825, 826, 1e-4) < 1e-9


def test_groups_hold_every_parameter_once_and_lora_plus_scales_b():
    model = torch.nn.Module()
    model.lora_A, model.lora_B, model.norm = (
        torch.nn.Linear(4, 2, bias=False),
        torch.nn.Linear(2, 4, bias=False),
        torch.nn.LayerNorm(4),
    )
    model.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    optimizer = build_optimizer(model, Config(**PLAIN, weight_decay=0.1, loraplus_lr_ratio=16.0))
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(g["params"] for g in optimizer.param_groups)  # an empty group crashes ZeRO-3
    set_lr(optimizer, 0.5)
    assert (
        found[id(model.lora_A.weight)]["lr"] == 0.5 and found[id(model.lora_B.weight)]["lr"] == 8.0
    )
    assert (
        found[id(model.lora_A.weight)]["weight_decay"] == 0.1
        and found[id(model.norm.weight)]["weight_decay"] == 0.0
    )
    assert math.isclose(optimizer.defaults["lr"], 1e-4)


def test_a_spike_is_so_many_deviations_above_what_came_before():
    recent = [1.0, 3.0] * 10  # mean 2, deviation 1
    assert math.isclose(loss_spike_threshold(recent, 3.0), 5.0)
    assert (
        loss_spike_threshold(recent, None) == loss_spike_threshold(recent[:19], 3.0) == math.inf
    )  # switched off; too little to go by


def test_a_spoiled_step_leaves_nothing_behind(tmp_path):
    """On three ranks a weight of 25 numbers is padded to 27: NaN in the padding would stay for every later step."""
    (tmp_path / "spoiled.py").write_text("""
import deepspeed, torch
from loop.distributed.world import init_distributed
from loop.zero3.gradients import clip_grad_norm, spoil
init_distributed()
torch.manual_seed(0)
model = torch.nn.Linear(5, 5, bias=False)
ds = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False,
      "data_types": {"grad_accum_dtype": "fp32"}}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=ds)
for step in range(3):
    engine.backward(engine(torch.ones(1, 5)).square().sum())
    norm = clip_grad_norm(list(engine.module.parameters()), 1.0)
    spoil(list(engine.module.parameters()), torch.tensor(step == 1))
    engine.step()
    print("SAID", step, bool(norm == norm), engine.was_step_applied())
""")
    said = [
        line
        for line in run_ok(3, str(tmp_path / "spoiled.py")).splitlines()
        if line.startswith("SAID")
    ]
    assert said == ["SAID 0 True True", "SAID 1 True False", "SAID 2 True True"]
