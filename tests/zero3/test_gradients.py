"""Gradients in ZeRO-3's slices. Clipping is compared with the plain loop in tests/proofs."""

from helpers import run_ok


def test_an_invalidated_step_leaves_nothing_behind(tmp_path):
    """On three ranks a weight of 25 numbers is padded to 27.

    NaN in the padding would stay for every later step.
    """
    (tmp_path / "invalidated.py").write_text("""
import deepspeed, torch
from loop.distributed.world import init_distributed
from loop.zero3.gradients import clip_grad_norm, invalidate_gradients
init_distributed()
torch.manual_seed(0)
model = torch.nn.Linear(5, 5, bias=False)
ds_config = {
    "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False, "data_types": {"grad_accum_dtype": "fp32"},
}
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(model.parameters()), config=ds_config
)
parameters = list(engine.module.parameters())
for step in range(3):
    engine.backward(engine(torch.ones(1, 5)).square().sum())
    norm = clip_grad_norm(parameters, 1.0)
    invalidate_gradients(parameters, torch.tensor(step == 1))
    engine.step()
    print("STEP", step, bool(norm == norm), engine.was_step_applied())
""")
    output = run_ok(3, str(tmp_path / "invalidated.py"))
    lines = [line for line in output.splitlines() if line.startswith("STEP")]
    assert lines == ["STEP 0 True True", "STEP 1 True False", "STEP 2 True True"]
