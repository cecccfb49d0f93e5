"""A quantisation that is added from outside is used wherever NF4 is: nothing else is asked for."""

import json
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    HfQuantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from loop.config.schema import Config
from loop.export.audit import provenance
from loop.export.merge import merge
from loop.generation.loading import load_for_generation
from loop.kernels.fuse import choose_dequantized, install_fused_parts
from loop.kernels.quantization import QUANTIZATIONS, Quantization, find_quantization
from loop.memory.breakdown import memory_breakdown
from loop.memory.estimate import RunShape, estimate_memory
from loop.model.loading import load_base
from loop.model.streaming import make_parameter
from loop.model.structure import decoder_layers


def round_to_bytes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8, one fp32 scale) of a weight."""
    scale = weight.abs().max().float() / 127
    return (weight / scale).round().to(torch.int8), scale


class ByteLinear(nn.Linear):
    """A linear layer whose weight is stored as int8, and one scale."""

    def __init__(self, *args, compute_dtype: torch.dtype, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.compute_dtype = compute_dtype
        self.scale: torch.Tensor | None = None

    def set_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, Bytes().dequantize(self, x.dtype), self.bias)


class ByteConfig(QuantizationConfigMixin):
    """What transformers is told: bytes, and the dtype of the computation."""

    def __init__(self, dtype: torch.dtype = torch.float32, **kwargs) -> None:
        self.quant_method = "bytes"
        self.dtype = dtype


class ByteQuantizer(HfQuantizer):
    """What transformers does with it: linear layers of the decoder are exchanged, and rounded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        for layer in model.get_decoder().layers:
            for name, module in list(layer.named_modules()):
                if type(module) is nn.Linear:
                    with torch.device("meta"):
                        new = ByteLinear(
                            module.in_features,
                            module.out_features,
                            bias=module.bias is not None,
                            compute_dtype=self.quantization_config.dtype,
                        )
                    layer.set_submodule(name, new)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, ByteLinear):
                module.set_codes(*round_to_bytes(module.weight.data))
        return model

    def is_serializable(self, **kwargs):
        return False

    @property
    def is_trainable(self):
        return True


class Bytes(Quantization):
    """All that this project is told."""

    lora_layer = PeftLinear

    def transformers_config(self, dtype, double_quant=True):
        return ByteConfig(dtype)

    def describes(self, config):
        return isinstance(config, ByteConfig)

    def is_quantized(self, module):
        return isinstance(module, ByteLinear)

    def dequantize(self, module, dtype):
        return (module.weight * module.scale).to(dtype)

    def quantized_parameter(self, module, value, state, device):
        codes, module.scale = (value, state["scale"]) if state else round_to_bytes(value)
        return nn.Parameter(codes.to(device), requires_grad=False)

    def round_trip(self, weight, double_quant):
        codes, scale = round_to_bytes(weight)
        return (codes * scale).to(weight.dtype)

    def state_tensors(self, module):
        return [module.scale]

    def code_bytes(self, num_weights):
        return num_weights

    def state_bytes(self, num_weights, double_quant):
        return 4

    def storage_dtype(self, dtype):
        return torch.int8


class ByteRun(Config):
    """A run that asks for it."""

    @property
    def quantization(self) -> str:
        return "bytes"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(QUANTIZATIONS, "bytes", Bytes())
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bytes", ByteConfig)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bytes", ByteQuantizer)


@pytest.fixture
def model(tiny_base):
    return load_base(tiny_base, torch.float32, "cpu", quantization="bytes")


def byte_linears(model) -> list[ByteLinear]:
    return [module for module in model.modules() if isinstance(module, ByteLinear)]


def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits


def with_lora(model):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def test_a_base_is_loaded_in_it(model, tiny_base):
    linears = byte_linears(model)
    assert len(linears) == 3 * 7 and {m.weight.dtype for m in linears} == {torch.int8}
    assert all(find_quantization(m) is QUANTIZATIONS["bytes"] for m in linears)
    plain = load_base(tiny_base, torch.float32, "cpu", quantization=None)
    with torch.no_grad():
        rounding = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < rounding < 0.1


def test_a_streamed_weight_is_quantised_by_it(model):
    linear, value = byte_linears(model)[0], torch.randn(8, 4)
    made = make_parameter(linear, "weight", value, {}, torch.float32, "cpu")
    assert made.dtype == torch.int8 and torch.equal(
        made * linear.scale, Bytes().round_trip(value, True)
    )
    again = make_parameter(linear, "weight", made, {"scale": torch.ones(())}, torch.float32, "cpu")
    assert torch.equal(again, made) and linear.scale == 1


@pytest.mark.parametrize("cached", [False, True])
def test_fused_layers_dequantise_by_it(model, cached):
    model.enable_input_require_grads()
    model = with_lora(model).train()

    def outputs():
        out = logits(model)
        out.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return [out.detach(), *grads]

    plain = outputs()
    assert choose_dequantized(
        ByteRun(base="x", data={"train": "x"}), decoder_layers(model), 10**9, False
    )
    assert install_fused_parts(decoder_layers(model), cached) == set()
    fused = outputs()
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, fused, strict=True)
    )


def test_memory_is_estimated_and_measured_by_it(model, tiny_base):
    config = ByteRun(base="x", data={"train": "x"})
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    parts = estimate_memory(
        config, ds_config, AutoConfig.from_pretrained(tiny_base), RunShape(1, False), 1, False
    )
    linears = byte_linears(model)
    assert parts["NF4 codes"] == sum(m.weight.numel() for m in linears)
    assert parts["quantisation state"] == 4 * len(linears)
    optimizer = types.SimpleNamespace(state={})
    engine = types.SimpleNamespace(module=model, optimizer=optimizer)
    ranks = types.SimpleNamespace(device=torch.device("cpu"))
    measured = memory_breakdown(engine, ranks)
    assert measured["memory/scales_gib"] * 2**30 == 4 * len(linears)


def test_an_adapter_names_it_and_is_loaded_and_merged_with_it(model, tiny_base, tmp_path):
    adapter = tmp_path / "adapter"
    with_lora(model).save_pretrained(adapter, save_embedding_layers=False)
    config = ByteRun(base=tiny_base, data={"train": "x"})
    trained = provenance(config, torch.float32, adapter / "adapter_model.safetensors")
    assert trained["storage"] == "bytes"
    (adapter / "trained.json").write_text(json.dumps(trained))

    generator, _ = load_for_generation(str(adapter), None, "cpu")
    assert len(byte_linears(generator)) == 3 * 7

    out = merge(str(adapter), str(tmp_path / "merged"), into="bytes")
    merged = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    base = load_file(f"{tiny_base}/model.safetensors")[name].bfloat16()
    layer = generator.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
    expected = Bytes().round_trip(base, True).float() + layer.get_delta_weight("default").float()
    assert torch.equal(merged[name], expected.bfloat16())
    assert isinstance(generator, PeftModel)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
