"""Products in FP8: rows and their scales, both passes of a layer, and where they are refused.

A CPU multiplies FP8 as well (torch 2.13), so everything but the Triton kernel runs here.
"""

import copy

import pytest
import torch
from test_fused_layers import SHAPE, loss_and_gradients, with_lora
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from loop.config.schema import Config, ConfigError
from loop.fp8 import admission, products
from loop.fp8.admission import admit_fp8, product_problem, require_right_products
from loop.fp8.layers import fp8_groups
from loop.fp8.products import CODE, product, quantize_rows
from loop.kernels.fuse import fuse
from loop.kernels.patches import restore_rotary
from loop.model.loading import load_base
from loop.model.structure import decoder_layers


@pytest.fixture(autouse=True)
def rotary_as_shipped():
    yield
    restore_rotary(modeling_llama)


def uneven(rows: int, width: int) -> torch.Tensor:
    """Rows whose sizes lie four orders of magnitude apart; one of them is 0."""
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, width, generator=generator)
    x *= 10 ** (8 * torch.rand(rows, 1, generator=generator) - 4)
    x[rows // 2] = 0
    return x


def dequantized(rows) -> torch.Tensor:
    return rows.codes.float() * rows.scales


def test_a_row_is_its_scale_times_codes():
    """Up to 1/16 of each number, but where it is next to nothing beside the row's largest."""
    x = uneven(20, 300)
    rows = quantize_rows(x)
    assert rows.codes.dtype == CODE and rows.scales.shape == (20, 1)
    largest = x.abs().amax(1, keepdim=True)
    assert torch.allclose(dequantized(rows).abs().amax(1, keepdim=True), largest)
    allowed = torch.maximum(x.abs() / 16, largest / 448 * 2**-10)
    assert ((dequantized(rows) - x).abs() <= 1.001 * allowed).all()
    assert dequantized(rows)[10].eq(0).all() and rows.codes.float().isfinite().all()


def test_parts_of_a_row_share_its_scale():
    parts = uneven(20, 48), uneven(20, 16), uneven(20, 32)
    together, one = quantize_rows(*parts), quantize_rows(torch.cat(parts, 1))
    assert torch.equal(together.codes.float(), one.codes.float())
    assert torch.equal(together.scales, one.scales)


def test_what_is_not_finite_stays_so():
    for value in (torch.inf, torch.nan):
        x = torch.ones(2, 16)
        x[0, 3] = value
        y = product(quantize_rows(x), quantize_rows(torch.ones(16, 16)), torch.float32)
        assert not y[0].isfinite().any() and torch.allclose(y[1], torch.full((16,), 16.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_its_codes(dtype):
    x, weight, bias = uneven(40, 64), uneven(48, 64), torch.randn(48).to(dtype)
    rows, codes = quantize_rows(x), quantize_rows(weight)
    exact = dequantized(rows).double() @ dequantized(codes).double().t()
    y = product(rows, codes, dtype)
    bound = 1e-6 if dtype == torch.float32 else 3e-3
    assert y.dtype == dtype and (y - exact).norm() < bound * exact.norm()
    y = product(rows, codes, dtype, bias)
    assert (y - exact - bias).norm() < bound * (exact + bias).norm()


def distance(ours: dict, exact: dict, part: str) -> float:
    """Relative, over all gradients whose name holds the part together."""
    names = [name for name in exact if part in name]
    apart = sum((ours[n].float() - exact[n]).square().sum() for n in names)
    return (apart / sum(exact[n].square().sum() for n in names)).sqrt().item()


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradients_beside_bf16s_own(tmp_path, quantization):
    """Both against fp32, with dropout and biases: E4M3 has 4 bits of mantissa less than bf16."""
    torch.manual_seed(0)
    bias = quantization is None
    config = LlamaConfig(**SHAPE, initializer_range=0.1, attention_bias=bias, mlp_bias=bias)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)

    def gradients(dtype, **options):
        base = load_base(str(tmp_path), dtype, "cpu", quantization=quantization)
        model, masks = with_lora(base, dtype)
        assert fuse(decoder_layers(model), False, **options) == set()
        return loss_and_gradients(model, masks)

    exact, bf16 = gradients(torch.float32), gradients(torch.bfloat16)
    kept = gradients(torch.bfloat16, make_group=fp8_groups(True))
    made_again = gradients(torch.bfloat16, make_group=fp8_groups(False))
    assert all(torch.equal(kept[name], made_again[name]) for name in exact)
    for part in ("layers.0", "layers.1", "lora_A", "lora_B"):
        ours, own = distance(kept, exact, part), distance(bf16, exact, part)
        assert 2 * own < ours < 16 * own < 1, part
    # No scale is lost on the way: the projection on the exact gradient is its length.
    names = [name for name in exact if name != "loss"]
    along = sum((kept[n].float() * exact[n]).sum() for n in names)
    assert abs(along / sum(exact[n].square().sum() for n in names) - 1) < 0.05
    assert abs(kept["loss"] / exact["loss"] - 1) < 5e-3


def test_only_training_is_in_fp8():
    torch.manual_seed(0)
    plain, _ = with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE)), dropout=0.0)
    model = copy.deepcopy(plain)
    fuse(decoder_layers(plain), False)
    fuse(decoder_layers(model), False, fp8_groups(True))
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        ours, theirs = (m.eval()(input_ids=ids).logits for m in (model, plain))
    assert torch.equal(ours, theirs)


class OneRank:
    device = torch.device("cpu")

    @staticmethod
    def all_gather_json(value):
        return [value]


def as_if_on(monkeypatch, *capabilities):
    monkeypatch.setattr(admission, "asked_for_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capabilities[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")


def of(**changes) -> Config:
    return Config(base="x", data={"train": "x"}, **changes)


def test_where_it_is_refused(monkeypatch):
    llama = LlamaConfig(**SHAPE)
    config = of(compute="fp8")
    ds_config = {"bf16": {"enabled": True}}
    for capabilities, reason in (
        ([], "and this is a CPU"),
        ([(8, 0)], "GPU 0, card 0, has 8.0"),
        ([(9, 0), (8, 6)], "GPU 1, card 1, has 8.6"),
    ):
        as_if_on(monkeypatch, *capabilities)
        with pytest.raises(ConfigError, match=f"^compute=fp8: .*{reason}; set compute=bf16$"):
            admit_fp8(config, ds_config, llama)
        admit_fp8(of(), ds_config, llama)
    as_if_on(monkeypatch, (8, 9), (9, 0), (12, 0))
    admit_fp8(config, ds_config, llama)
    with pytest.raises(ConfigError, match="needs bf16"):
        admit_fp8(config, {"bf16": {"enabled": False}}, llama)
    for key, value in (("hidden_size", 72), ("intermediate_size", 100)):
        with pytest.raises(ConfigError, match=f"{key} is {value}, no multiple of 16"):
            admit_fp8(config, ds_config, LlamaConfig(**SHAPE | {key: value, "head_dim": 16}))
    for key, value in (("method", "full"), ("fused_layers", False)):
        with pytest.raises(ValueError, match=f"compute=fp8: .*{key}={str(value).lower()}"):
            of(compute="fp8", **{key: value})


def test_products_that_are_wrong_here_are_refused(monkeypatch):
    config = of(compute="fp8")
    assert product_problem("cpu") is None
    require_right_products(of(), False, "", OneRank)
    require_right_products(config, True, "", OneRank)
    with pytest.raises(ConfigError, match="needs fused layers; because"):
        require_right_products(config, False, "because", OneRank)
    right = admission.product

    def wrong(*args):
        return 1.1 * right(*args)

    def missing(*args):
        raise RuntimeError("no such kernel\nand more")

    for replaced, reason in ((wrong, "a product's error is 1"), (missing, "no such kernel")):
        monkeypatch.setattr(admission, "product", replaced)
        with pytest.raises(ConfigError, match=f"^compute=fp8: .*{reason}"):
            require_right_products(config, True, "", OneRank)


def test_a_cpu_says_so_in_one_line(rows, tiny_base, capsys, monkeypatch):
    """Before the data are read, with exit code 2."""
    from loop.commands import train

    monkeypatch.setattr(train, "begin", lambda: None)
    args = [f"base={tiny_base}", f"data.train={rows['train']}", "data.valid=null"]
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", "loop/configs/embedded.yaml", *args, "compute=fp8"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "compute=fp8: needs an NVIDIA GPU" in lines[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(2048,), (300, 17, 200), (5632, 5632)])
def test_the_kernel_quantises_as_plain_pytorch(widths, monkeypatch):
    parts = [uneven(700, width).bfloat16().cuda() for width in widths]
    ours = quantize_rows(*parts)
    monkeypatch.setattr(products, "on_triton", lambda x: False)
    plain = quantize_rows(*parts)
    assert torch.equal(ours.scales, plain.scales)
    differ = (ours.codes.float() != plain.codes.float()).float().mean().item()
    assert differ < 1e-4  # a quotient on the border between two codes
    apart = (dequantized(ours) - dequantized(plain)).norm() / dequantized(plain).norm()
    assert apart < 1e-3
