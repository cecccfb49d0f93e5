"""What is summed in fp32, and what the base is stored as, whatever the run computes in."""

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F

from loop.config.cli import load_config
from loop.config.deepspeed import build_ds_config
from loop.evaluation.loss import document_losses
from loop.model import loading
from loop.model.loss import summed_cross_entropy


def test_cross_entropies_of_bf16_logits_are_added_in_fp32():
    """A sum of bf16 has 8 bits: 3,000 tokens of 7 nats would be off by percents."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(1, 3000, 50, generator=generator)).bfloat16()
    targets = torch.randint(0, 50, (3000,), generator=generator)
    exact = F.cross_entropy(logits[0].double(), targets, reduction="sum").item()
    ours = summed_cross_entropy(logits, targets)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(exact, rel=1e-6)
    bounds = torch.tensor([0, 1000, 3000], dtype=torch.int32)
    batch = SimpleNamespace(targets=targets, cu_seqlens=bounds, target_positions=torch.arange(3000))
    losses = document_losses(logits, batch)
    assert losses[:, 0].sum().item() == pytest.approx(exact, rel=1e-6)
    assert losses[:, 1].tolist() == [1000, 2000]


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_base_is_stored_as_the_run_says(config_file, monkeypatch, double_quant):
    """In bytes where the engine computes in fp32: it would cast a float16 by value."""
    monkeypatch.setattr(loading.dist, "get_world_size", lambda: 1)
    config = load_config(["--config", str(config_file), f"double_quant={double_quant}"])
    for ds_config, storage in (
        (build_ds_config(config, for_gpus=True), torch.bfloat16),
        ({"zero_optimization": {"stage": 3}}, torch.uint8),
    ):
        model = loading.load_sharded_base(config, ds_config, "cpu", "sdpa")
        layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(layers) == 7 * 3
        assert {layer.weight.quant_state.nested for layer in layers} == {double_quant}
        assert {layer.weight.dtype for layer in layers} == {storage}
