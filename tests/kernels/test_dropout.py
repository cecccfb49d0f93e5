"""Dropout whose mask belongs to the example."""

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from loop.kernels.dropout import (
    DropoutMasks,
    PerExampleDropout,
    apply_dropout_mask,
    install_dropout,
)

WIDTH = 600


def mask(
    step: int, examples: list[int], lengths: list[int], seed: int = 1, p: float = 0.1
) -> torch.Tensor:
    """bool [T, WIDTH]"""
    masks = DropoutMasks(p, seed, "cpu")
    masks.width = WIDTH
    masks.draw(step, examples, torch.tensor([0, *lengths]).cumsum(0))
    return masks.keep


def test_a_mask_follows_seed_step_and_example_and_not_the_row():
    row = mask(3, [7, 8, 9], [50, 60, 70])
    assert torch.equal(row[50:110], mask(3, [8], [60]))
    assert torch.equal(row[110:], mask(3, [9, 7], [70, 50])[:70])
    # a rank without work
    assert torch.equal(mask(3, [], [1]), torch.ones(1, WIDTH, dtype=torch.bool))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_rate_is_right_and_draws_are_independent(p):
    """Correlations of 120,000 draws are noise.

    Between examples, steps and seeds, between modules (shifted columns) and tokens.
    """
    one = mask(3, [7], [200], p=p)
    noise = 5 / (one.numel() ** 0.5)
    assert abs(one.float().mean() - (1 - p)) < noise
    others = [
        mask(3, [8], [200], p=p),
        mask(4, [7], [200], p=p),
        mask(3, [7], [200], seed=2, p=p),
        one.roll(1, 1),
        one.roll(22, 1),
        one.roll(1, 0),
    ]
    for other in others:
        both = torch.stack([one.flatten().float(), other.flatten().float()])
        assert abs(torch.corrcoef(both)[0, 1]) < noise
    # No feature and no token is treated apart.
    assert ((one.float().mean(0) - (1 - p)).abs() < 6 * (p * (1 - p) / 200) ** 0.5).all()
    assert ((one.float().mean(1) - (1 - p)).abs() < 6 * (p * (1 - p) / WIDTH) ** 0.5).all()


class Lora(nn.Module):
    """What peft's layers look like from outside."""

    def __init__(self, features: int, p: float) -> None:
        super().__init__()
        self.in_features, self.lora_A = features, nn.Linear(features, 4, bias=False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(p) if p else nn.Identity()})

    def forward(self, x):
        return self.lora_A(self.lora_dropout["default"](x))


def test_every_module_gets_its_own_columns_and_values_are_those_of_dropout():
    torch.manual_seed(0)
    model = nn.ModuleList([Lora(16, 0.25), Lora(32, 0.25)])
    masks = install_dropout(model, 0.25, 1, "cpu")
    assert [m.lora_dropout["default"].column for m in model] == [0, 16] and masks.width == 64
    masks.draw(0, [5], torch.tensor([0, 8]))
    x = torch.randn(1, 8, 32, requires_grad=True)
    out = model[1].lora_dropout["default"](x)
    assert torch.allclose(out, x * masks.keep[:, 16:48] / 0.75)
    out.sum().backward()
    assert torch.allclose(x.grad, masks.keep[:, 16:48].float()[None] / 0.75)
    assert 0 < (x.grad == 0).float().mean() < 0.5
    model.eval()
    assert model[1].lora_dropout["default"](x) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_is_applied_with_the_bits_of_torchs_kernel(dtype):
    x = torch.randn(2, 50, 48).to(dtype)
    keep = (torch.rand(50, 200) < 0.9)[:, 16:64].expand(x.shape)
    for scale in (1 / 0.9, 2 / 0.95):
        wanted = torch.ops.aten.native_dropout_backward(x, keep, scale)
        assert torch.equal(apply_dropout_mask(x, keep, scale), wanted)


def test_without_dropout_nothing_is_replaced_or_drawn():
    model = nn.ModuleList([Lora(16, 0.0)])
    masks = install_dropout(model, 0.0, 1, "cpu")
    masks.draw(0, [5], torch.tensor([0, 8]))
    assert isinstance(model[0].lora_dropout["default"], nn.Identity) and not hasattr(masks, "keep")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_layer_meets_the_same_mask(reentrant):
    torch.manual_seed(0)
    model = nn.ModuleList([Lora(16, 0.5)])
    install_dropout(model, 0.5, 1, "cpu").draw(0, [5], torch.tensor([0, 64]))
    assert isinstance(model[0].lora_dropout["default"], PerExampleDropout)
    x, grads = torch.randn(1, 64, 16, requires_grad=True), []
    for run in (lambda: model[0](x), lambda: checkpoint(model[0], x, use_reentrant=reentrant)):
        model.zero_grad()
        run().square().sum().backward()
        grads.append(model[0].lora_A.weight.grad.clone())
    assert torch.equal(*grads)


def test_a_shorter_row_has_the_first_rows_of_the_same_memory():
    masks = DropoutMasks(0.1, 1, "cpu")
    masks.width = WIDTH
    masks.draw(3, [7, 8], torch.tensor([0, 50, 110]))
    address = masks.keep.data_ptr()
    masks.draw(3, [8], torch.tensor([0, 60]))
    assert masks.keep.shape == (60, WIDTH) and masks.keep.data_ptr() == address
    assert torch.equal(masks.keep, mask(3, [8], [60]))
