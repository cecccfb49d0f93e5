"""The check's own bounds: an error that matters in training is never ok."""

import json
import sys
from functools import partial

import bitsandbytes as bnb
import pytest
import torch

import kernels_check.__main__ as command
from kernels_check import attention, leak, nf4, optimizers, zero3
from kernels_check.rows import Row
from loop.kernels.attention import packed_attention

sdpa = partial(packed_attention, backend="sdpa")


class Blend(torch.autograd.Function):
    """x and a little of another document, in the forward pass or in the backward pass alone."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_part = backward
        return x + forward * x.mean(0, keepdim=True) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.backward_part * grad.mean(0, keepdim=True), None, None


@pytest.mark.parametrize(("forward", "backward"), [(1e-2, 0.0), (0.0, 1e-2)])
def test_a_leak_of_a_percent_is_wrong_in_either_direction(forward, backward):
    def attend(query, key, value, *rest):
        return sdpa(query, key, Blend.apply(value, forward, backward), *rest)

    (row,) = leak.check_leak("x", "1", attend, "cpu")
    assert 0 < row.error < 0.05 and row.verdict == "wrong" and row.bound == 0


@pytest.mark.parametrize("off", [1.04, 0.96])
def test_gradients_of_attention_are_compared(off):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return off * grad

    for at in range(3):  # of the query, the key, the value

        def attend(*row, at=at):
            row = [Scaled.apply(x) if i == at else x for i, x in enumerate(row)]
            return sdpa(*row)

        (row,) = attention.check_numbers("x", "1", attend, "cpu")
        assert row.verdict == "wrong", at


@pytest.mark.parametrize("off", [1.001, 0.9])
def test_an_optimizer_a_thousandth_off_is_wrong_and_a_tenth_is_for_eight_bits(off):
    def make(parameters, **settings):
        return torch.optim.AdamW(parameters, **(settings | {"lr": off * settings["lr"]}))

    for bound in (optimizers.BOUND, optimizers.EIGHT_BIT_BOUND):
        (row,) = optimizers.check_optimizer("x", "1", make, bound, "cpu")
        assert (row.verdict == "wrong") == (bound == optimizers.BOUND or off == 0.9)


def test_quantised_scales_are_compared_by_themselves():
    """Weights that are decoded with scales a fifth off are as their scales say."""
    quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit

    def wrong_scales(weight, **options):
        packed, state = quantize(weight, **options)
        if state.nested:
            state.state2.absmax *= 1.2
        return packed, state

    rows = nf4.check_rounding("1", wrong_scales, dequantize, "cpu")
    wrong = [row.what for row in rows if row.verdict == "wrong"]
    assert wrong == ["nf4 double quantisation"]


def test_the_gradient_of_the_product_is_compared():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return 1.05 * grad

    def matmul(x, **options):
        return bnb.matmul_4bit(Scaled.apply(x), **options)

    functions = matmul, bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
    (row,) = nf4.check_product("1", *functions, "cpu")
    assert row.verdict == "wrong"


def test_states_of_a_gathered_layer_are_compared(monkeypatch):
    """Its bytes are right and a scale is not."""
    layer = zero3.Layers((torch.uint8,), "cpu").layers[0]
    packed = zero3.stored_bytes(layer).clone()
    state = {name: value.clone() for name, value in zero3.stored_state(layer).items()}
    layer.weight.data, whole = layer.weight.data[:0], layer.weight.data

    class Gathered:
        def __init__(self, parameters):
            pass

        def __enter__(self):
            layer.weight.data = whole

        def __exit__(self, *_):
            layer.weight.data = whole[:0]

    monkeypatch.setattr("deepspeed.zero.GatheredParameters", Gathered)
    assert zero3.check_gathered(layer, torch.uint8, packed, state).verdict == "ok"
    spoilt = state | {"absmax": state["absmax"] + 1}
    assert zero3.check_gathered(layer, torch.uint8, packed, spoilt).verdict == "wrong"
    assert zero3.check_gathered(layer, torch.uint8, packed ^ 1, state).verdict == "wrong"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (Row("a"), 0),
        (Row("a", verdict="slow", note="n"), 0),
        (Row("a", verdict="wrong", note="n"), 1),
        (Row("a", verdict="missing", note="n"), 1),
        (Row("a", verdict="wrong", note="n", required=False), 0),
    ],
)
def test_the_exit_code_says_whether_training_can_start(row, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "run_all", lambda: [Row("first"), row])
    monkeypatch.setattr(command.check_results, "save", lambda rows: "here")
    monkeypatch.setattr(sys, "argv", ["check", "--json", str(tmp_path / "rows.json")])
    assert command.main() == code
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["can_start"] == (code == 0) and len(report["rows"]) == 2
    said = "QLoRA training can't start: a" if code else "QLoRA training can start"
    assert said in capsys.readouterr().out
