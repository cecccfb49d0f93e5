"""The patches of DeepSpeed have a way back: an engine trains on as if it had never been patched."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import run_ok

from loop.zero3 import replicated

DS_CONFIG = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_force_ds_cpu_optimizer": False,
}


def make_engine():
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DS_CONFIG)
    return engine


def train(engine, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 5)).square().sum())
        engine.step()


def weights(engine) -> torch.Tensor:
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([p.detach().flatten().clone() for p in parameters])


def patched_members(engine) -> dict:
    """What `ReplicatedWeights` overwrites or removes, and the state of the weights."""
    parameters = list(engine.module.parameters())
    hooks = [
        str(hook).split(" at ")[0]  # without its address
        for module in engine.module.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    ]
    return {
        "partition": [p.partition for p in parameters],
        "status": [p.ds_status for p in parameters],
        "hooks": hooks,
        "partition all": "partition_all_parameters" in vars(engine.optimizer.parameter_offload),
        "step": "step" in vars(engine.optimizer),
        "optimizer": sorted(vars(engine.optimizer.optimizer)),
        "stream": engine.optimizer.reduce_and_partition_stream,
    }


def worker() -> None:
    from loop.distributed.world import init_distributed
    from loop.zero3.replicated import has_nonfinite, is_replicated, replicate_weights

    ranks = init_distributed()
    is_last = ranks.rank == ranks.world_size - 1
    gradients = {0: [torch.ones(2)], 1: [torch.tensor([float("nan") if is_last else 1.0])]}
    assert has_nonfinite(gradients) == 1  # on every rank
    assert has_nonfinite({0: [torch.ones(2)]}) == 0
    engine = make_engine()
    train(engine, 6)
    expected = weights(engine)
    engine.destroy()

    engine = make_engine()
    train(engine, 2)
    before = patched_members(engine)
    assert all("NOT_AVAILABLE" in str(status) for status in before["status"])
    replicated = replicate_weights(engine, ranks)
    assert is_replicated(engine)
    assert patched_members(engine) != before
    assert sum(p.numel() for p in engine.module.parameters()) == 5 * 7 + 7 + 7 * 3 + 3
    train(engine, 2)
    assert sum(p.numel() for p in engine.module.parameters()) == 5 * 7 + 7 + 7 * 3 + 3
    assert not any(engine.optimizer.averaged_gradients.values())  # their memory is free
    replicated.restore()
    assert not is_replicated(engine)
    after = patched_members(engine)
    for name, value in before.items():
        assert after[name] == value, name
    train(engine, 2)
    assert torch.equal(weights(engine), expected)
    print("RESTORED")


@pytest.mark.parametrize("world_size", [1, 2])
def test_restore_gives_the_engine_back(world_size):
    assert "RESTORED" in run_ok(world_size, "tests/zero3/test_replicated.py")


def test_an_engine_without_zero3_is_left_alone():
    from loop.zero3.replicated import is_replicated, replicate_weights

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SimpleNamespace(module=model, optimizer=optimizer)
    assert replicate_weights(engine, ranks=None) is None
    assert not is_replicated(engine)
    assert not is_replicated(model)


def test_the_cache_of_parameters_can_be_undone():
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    from loop.zero3.hooks import cache_module_parameters, restore_module_parameters

    original = partitioned_param_coordinator.iter_params
    cache_module_parameters()
    try:
        cached = partitioned_param_coordinator.iter_params
        assert cached is not original and parameter_offload.iter_params is cached
        cache_module_parameters()  # once more changes nothing
        assert partitioned_param_coordinator.iter_params is cached
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        model.ds_external_parameters = lambda: ()
        assert list(map(id, cached(model, True))) == list(map(id, model.parameters()))
        assert cached(model, True) is cached(model, True)
        before = cached(model, True)
        model.ds_external_parameters = lambda: ("another module's",)
        assert cached(model, True) is not before  # DeepSpeed found one that the module uses
    finally:
        restore_module_parameters()
    assert partitioned_param_coordinator.iter_params is original
    assert parameter_offload.iter_params is original
    restore_module_parameters()  # without a patch it does nothing
    assert partitioned_param_coordinator.iter_params is original


def fake_optimizer(gradient: float):
    """Of one weight: what `ReplicatedStep` reads of ZeRO-3's optimizer, and torch's plain AdamW."""
    master = torch.nn.Parameter(torch.ones(1))
    shard = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    inner = torch.optim.AdamW([master], lr=0.5)
    calls = []

    def step_group(group):
        calls.append("update")
        inner.step()

    return SimpleNamespace(
        optimizer=inner,
        averaged_gradients={0: [torch.tensor([gradient])]},
        fp32_partitioned_groups_flat=[master],
        fp16_partitioned_groups_flat=[shard],
        _pre_step=lambda: calls.append("prepare"),
        _optimizer_step=step_group,
        calls=calls,
    )


@pytest.mark.parametrize(("gradient", "skipped"), [(1.0, False), (math.nan, True)])
def test_plain_adamw_takes_no_step_with_a_gradient_that_is_no_number(
    monkeypatch, gradient, skipped
):
    monkeypatch.setattr(replicated.dist, "all_reduce", lambda tensor: None)
    optimizer = fake_optimizer(gradient)
    replicated.ReplicatedStep(optimizer, world_size=1)()
    assert optimizer.overflow is skipped
    # ZeRO-3's own preparations come first, whatever follows.
    assert optimizer.calls == (["prepare"] if skipped else ["prepare", "update"])
    weight = optimizer.fp16_partitioned_groups_flat[0]
    assert weight.isfinite().all() and (weight == 1).all() == skipped


if __name__ == "__main__":
    worker()
