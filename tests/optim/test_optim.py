"""The learning rate, the parameter groups, and optimizers and schedules added from outside.

Clipping over real shards is compared with the plain loop in tests/proofs.
"""

import math
import warnings

import pytest
import torch
from helpers import run_ok

from loop.config.deepspeed import build_ds_config
from loop.config.schema import Config, ConfigError
from loop.optim import adamw
from loop.optim.adamw import (
    OPTIMIZERS,
    OptimizerSpec,
    build_optimizer,
    optimizer_spec,
    optimizer_warning,
    spec_of,
)
from loop.optim.schedule import SCHEDULES, build_lr_schedule, cosine_lr, learning_rates, set_lr
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
    ours = [cosine_lr(s, steps, 0.1, min_lr=min_lr) for s in range(steps)]
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("first", "mult"), [(10, 1), (10, 2), (3, 3), (1, 1)])
def test_restarts_are_torchs_warm_restarts(first, mult):
    theirs = torch_curve(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, first, mult, 0.001), 200
    )
    options = {"min_lr": 0.001, "restart_steps": first, "restart_mult": mult}
    ours = [cosine_lr(s, 200, 0.1, **options) for s in range(200)]
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_warm_up_is_transformers(warmup):
    from transformers import get_cosine_schedule_with_warmup

    theirs = torch_curve(lambda o: get_cosine_schedule_with_warmup(o, warmup, 100), 100)
    ours = [cosine_lr(s, 100, 0.1, warmup_steps=warmup) for s in range(100)]
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_the_curve_starts_at_lr_and_ends_near_min_lr():
    assert cosine_lr(0, 826, 1e-4) == 1e-4
    assert cosine_lr(1, 826, 1e-4) == pytest.approx(9.99e-5, rel=1e-3)
    assert 0 < cosine_lr(825, 826, 1e-4) < 1e-9


def test_the_schedule_of_a_run_is_the_plotted_one():
    options = {"warmup_steps": 3, "min_lr": 1e-5, "restart_steps": 5, "restart_mult": 2}
    config = Config(**PLAIN, lr=3e-3, **options)
    lr_at = build_lr_schedule(config, 40)
    assert learning_rates(config, 40) == [lr_at(step) for step in range(40)]
    assert lr_at(17) == cosine_lr(17, 40, 3e-3, **options)


def test_a_schedule_can_be_added(monkeypatch):
    def linear(config: Config, num_steps: int):
        return lambda step: config.lr * (1 - step / num_steps)

    monkeypatch.setitem(SCHEDULES, "linear", linear)
    config = Config(**PLAIN, lr=0.1, lr_schedule="linear")
    assert learning_rates(config, 4) == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_an_unknown_schedule_or_optimizer_is_refused_in_one_line():
    config = Config(**PLAIN, lr_schedule="liner", optimizer="adam")
    with pytest.raises(ConfigError, match="^lr_schedule=liner: must be one of cosine$"):
        build_lr_schedule(config, 4)
    with pytest.raises(ConfigError, match="^optimizer=adam: must be one of auto, fused, plain"):
        build_optimizer(torch.nn.Linear(2, 2), config)


@pytest.mark.parametrize("name", ["auto", "plain", "adamw"])
def test_adamw_has_several_names(name):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Config(**PLAIN, optimizer=name))
    assert type(optimizer) is torch.optim.AdamW
    assert spec_of(optimizer) is optimizer_spec(name) is OPTIMIZERS["adamw"]
    assert optimizer_spec(name).bytes_per_weight == 8


@pytest.mark.parametrize(("name", "fused"), [("fused", True), ("plain", False)])
def test_the_name_decides_which_kernel_computes_adamw(name, fused):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Config(**PLAIN, optimizer=name))
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}


class Momentum(torch.optim.SGD):
    """SGD with momentum that counts its updates, as an optimizer of the table must."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", torch.tensor(0.0)) + 1


MOMENTUM = OptimizerSpec(
    Momentum,
    lambda groups, config: Momentum(groups, lr=config.lr, momentum=config.betas[0]),
    state_keys=("momentum_buffer",),
)


@pytest.mark.parametrize(("speedup", "fused"), [(0.8, False), (1.2, True), (None, False)])
def test_auto_takes_the_kernel_that_was_measured_faster(monkeypatch, speedup, fused):
    """On a CPU that was not measured: torch's plain one."""
    monkeypatch.setattr(adamw, "on_gpu", lambda: False)
    monkeypatch.setattr(adamw.check_results, "failure_reason", lambda *args: None)
    monkeypatch.setattr(adamw.check_results, "measured_speed", lambda name: speedup)
    assert adamw.choose_fused_adamw("auto") == (fused, "")


def test_lora_on_an_embedding_has_loraplus_rate_as_well():
    model = torch.nn.ParameterDict(
        {
            name: torch.nn.Parameter(torch.zeros(2, 2))
            for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
        }
    )
    groups = adamw.parameter_groups(model, Config(**PLAIN, loraplus_lr_ratio=16))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert [scales[id(model[name])] for name in sorted(model)] == [1, 16, 1, 16]


def test_an_optimizer_can_be_added(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "momentum", MOMENTUM)
    config = Config(**PLAIN, optimizer="momentum", weight_decay=0.1)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    assert type(optimizer) is Momentum and spec_of(optimizer) is MOMENTUM
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer_warning(config) == ""


def test_the_memory_estimate_knows_an_added_optimizer(monkeypatch):
    from transformers import LlamaConfig

    from loop.memory.estimate import RunShape, estimate_memory

    monkeypatch.setitem(OPTIMIZERS, "momentum", MOMENTUM)
    model_config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    run = RunShape(world_size=1, fused=True)

    def estimate(optimizer: str) -> dict[str, int]:
        config = Config(**PLAIN, optimizer=optimizer)
        return estimate_memory(
            config, build_ds_config(config, for_gpus=True), model_config, run, 1, False
        )

    assert 2 * estimate("momentum")["Adam moments"] == estimate("auto")["Adam moments"]


def train_with_momentum(ranks, replicated: bool, restored: bool) -> torch.Tensor:
    """The weights of a ZeRO-3 engine after three updates, flat.

    restored: before the last update the full state is gathered, zeroed and scattered again.
    """
    import deepspeed

    from loop.zero3.optimizer_state import adam_step
    from loop.zero3.replicated import replicate_weights

    ds_config = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 5)
    optimizer = build_optimizer(model, Config(**PLAIN, optimizer="momentum", lr=0.1))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if replicated:
        replicate_weights(engine, ranks)
    for step in range(3):
        if restored and step == 2:
            restore_from_itself(engine, ranks)
        engine.backward(engine(torch.ones(1, 5)).square().sum())
        engine.step()
    assert adam_step(engine) == 3
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([p.detach().flatten().clone() for p in parameters])


def restore_from_itself(engine, ranks) -> None:
    from loop.zero3.optimizer_state import (
        adam_step,
        create_adam_state,
        gather_full_state,
        scatter_full_tensor,
        tensor_kinds,
    )

    tensors = {}
    for part in gather_full_state(engine, ranks):
        tensors |= part
    assert tensor_kinds(engine) == ("master", "momentum_buffer")
    assert adam_step(engine) == 2
    create_adam_state(engine, adam_step(engine))
    for name, p in engine.module.named_parameters():
        for kind in tensor_kinds(engine):
            full = torch.zeros(tuple(p.ds_shape))
            if ranks.is_main:
                full = tensors[f"{name}.{kind}"]
                assert full.any()
            torch.distributed.broadcast(full, 0)
            scatter_full_tensor(p, kind, full, ranks)


def worker() -> None:
    from loop.distributed.world import init_distributed

    ranks = init_distributed()
    OPTIMIZERS["momentum"] = MOMENTUM
    plain = train_with_momentum(ranks, replicated=False, restored=False)
    restored = train_with_momentum(ranks, replicated=False, restored=True)
    replicated = train_with_momentum(ranks, replicated=True, restored=False)
    print("SAME", torch.equal(plain, restored), torch.equal(plain, replicated))


def test_zero3_trains_saves_and_restores_an_added_optimizer():
    """On two ranks, to the bit: restored from its own full state, and with replicated weights."""
    assert "SAME True True" in run_ok(2, "tests/optim/test_optim.py")


def test_groups_hold_every_parameter_once_and_lora_plus_scales_b():
    model = torch.nn.Module()
    model.lora_A = torch.nn.Linear(4, 2, bias=False)
    model.lora_B = torch.nn.Linear(2, 4, bias=False)
    model.norm = torch.nn.LayerNorm(4)
    model.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    optimizer = build_optimizer(model, Config(**PLAIN, weight_decay=0.1, loraplus_lr_ratio=16.0))
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(g["params"] for g in optimizer.param_groups)  # an empty group crashes ZeRO-3
    set_lr(optimizer, 0.5)
    a, b, norm = (found[id(m.weight)] for m in (model.lora_A, model.lora_B, model.norm))
    assert a["lr"] == 0.5 and b["lr"] == 8.0
    assert a["weight_decay"] == 0.1 and norm["weight_decay"] == 0.0
    assert math.isclose(optimizer.defaults["lr"], 1e-4)


def test_a_shard_decays_as_the_matrix_that_it_is_a_part_of():
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.ds_shape = p.shape
        p.data = torch.empty(0)  # as ZeRO-3 leaves it
    groups = adamw.parameter_groups(model, Config(**PLAIN, weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (decays[id(model.weight)], decays[id(model.bias)]) == (0.1, 0.0)


def test_an_adamw_that_is_not_the_fused_one_is_warned_of(monkeypatch):
    monkeypatch.setattr(adamw.check_results, "failure_reason", lambda *args: "wrong: too far off")
    monkeypatch.setattr(adamw.check_results, "measured_speed", lambda name: None)
    for name, warned in (("auto", True), ("plain", False), ("adamw", True)):
        warning = optimizer_warning(Config(**PLAIN, optimizer=name))
        assert ("fused is wrong: too far off" in warning) is warned, name
    with pytest.raises(ConfigError, match="^optimizer=fused: wrong: too far off"):
        optimizer_warning(Config(**PLAIN, optimizer="fused"))
    monkeypatch.setitem(OPTIMIZERS, "momentum", MOMENTUM)
    assert optimizer_warning(Config(**PLAIN, optimizer="momentum")) == ""


def test_a_spike_is_so_many_deviations_above_what_came_before():
    recent = [1.0, 3.0] * 10  # mean 2, deviation 1
    assert math.isclose(loss_spike_threshold(recent, 3.0), 5.0)
    assert loss_spike_threshold(recent, None) == math.inf  # switched off
    assert loss_spike_threshold(recent[:19], 3.0) == math.inf  # too little to go by


@pytest.mark.parametrize("steps", [1, 5])
def test_a_warm_up_as_long_as_the_run_is_refused(steps):
    config = Config(**PLAIN, warmup_steps=5)
    with pytest.raises(ConfigError, match=f"^warmup_steps=5: the whole run has {steps} steps; lr"):
        build_lr_schedule(config, steps)
    assert build_lr_schedule(config, 6)(5) == pytest.approx(config.lr)


def test_adamw_gets_the_runs_numbers():
    config = Config(**PLAIN, lr=3e-3, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.5, 0.7), 1e-3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


if __name__ == "__main__":
    worker()
