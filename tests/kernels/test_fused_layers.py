"""The fused parts of a decoder layer: what PEFT and transformers compute, and what is left alone."""

import copy

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from loop.config.schema import Config
from loop.kernels import lora_ops as kernels
from loop.kernels import self_test
from loop.kernels.dropout import install_dropout
from loop.kernels.fuse import choose_dequantized, fuse, fuse_norm, is_plain_lora, is_swiglu
from loop.model.activation_checkpointing import use_checkpointing
from loop.model.loading import load_base
from loop.model.structure import decoder_layers

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def rotary_as_shipped():
    """Ours stays in transformers' module for the whole process; what is compared with it must be the library's own."""
    yield
    modeling_llama.apply_rotary_pos_emb = getattr(
        modeling_llama.apply_rotary_pos_emb, "plain", modeling_llama.apply_rotary_pos_emb
    )


def with_lora(base, dtype=torch.float32, dropout=0.1, device="cpu", **lora):
    """(the model with random LoRA weights, its dropout masks)"""
    base.requires_grad_(False)
    base.enable_input_require_grads()
    torch.manual_seed(1)
    lora = {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    } | lora
    model = get_peft_model(
        base,
        LoraConfig(task_type="CAUSAL_LM", lora_dropout=dropout, **lora),
        autocast_adapter_dtype=False,
    ).to(device, dtype)
    model.config.use_cache = False
    return model.train(), install_dropout(model, dropout, 0, device)


def loss_and_gradients(model, masks) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 320, (1, 90), generator=torch.Generator().manual_seed(0))
    masks.draw(0, [3, 4], torch.tensor([0, 40, 90]))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def apart(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 14 + 1
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_fused_layers_compute_what_peft_computes(tmp_path, quantized, keep_dense):
    """With dropout, with and without biases and checkpointing, and token by token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, initializer_range=0.2, attention_bias=not quantized, mlp_bias=not quantized
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    seen = []
    for fused in (False, True):
        model, masks = with_lora(
            load_base(
                str(tmp_path), torch.float32, "cpu", quantization="nf4" if quantized else None
            )
        )
        assert not fused or fuse(decoder_layers(model), keep_dense) == set()
        figures = [loss_and_gradients(model, masks)]
        use_checkpointing(model)
        figures.append(loss_and_gradients(model, masks))
        seen.append(
            (
                figures,
                model.eval().generate(
                    torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False, use_cache=True
                ),
            )
        )
    (plain, plain_tokens), (ours, our_tokens) = seen
    assert max(map(apart, ours, plain)) < 3e-6 and torch.equal(our_tokens, plain_tokens)


def test_fewer_roundings_than_peft_in_bf16():
    """Both against fp32 from the same weights: ours is nearer, in the gradients of all layers together."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)).to(torch.bfloat16)
    exact = loss_and_gradients(*with_lora(copy.deepcopy(base).float()))
    distances = []
    for fused in (False, True):
        model, masks = with_lora(copy.deepcopy(base), torch.bfloat16)
        assert not fused or fuse(decoder_layers(model), False) == set()
        seen = loss_and_gradients(model, masks)
        distances.append(
            sum((seen[n].float() - exact[n]).square().sum().item() for n in seen) ** 0.5
        )
    assert 0 < distances[1] < distances[0]


def test_dequantised_weights_are_kept_where_there_is_room(tiny_base):
    model, small = (
        load_base(tiny_base, torch.bfloat16, "cpu"),
        20 * 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128),
    )
    for free, kept in (
        (None, True),
        (small, True),
        (small - 1, False),
    ):  # none: a CPU, which has more than that
        assert choose_dequantized(Config(base="x", data={"train": "x"}), model, free, False) is kept
        assert not choose_dequantized(Config(base="x", data={"train": "x"}), model, free, True)
        assert choose_dequantized(
            Config(base="x", data={"train": "x"}, cache_dequantized_weights=True), model, free, True
        )
        assert not choose_dequantized(
            Config(base="x", data={"train": "x"}, cache_dequantized_weights=False),
            model,
            free,
            False,
        )


class Scaled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_what_computes_something_else_is_left_alone():
    config = LlamaConfig(**SHAPE)
    gelu = LlamaConfig(**SHAPE, hidden_act="gelu")
    assert (
        is_swiglu(LlamaMLP(config))
        and not is_swiglu(LlamaMLP(gelu))
        and not is_swiglu(nn.Linear(2, 2))
    )
    assert not is_swiglu(
        GemmaMLP(LlamaConfig(**SHAPE, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"))
    )
    assert (
        fuse_norm(LlamaRMSNorm(64))
        and not fuse_norm(GemmaRMSNorm(64))
        and not fuse_norm(Scaled(64))
        and not fuse_norm(nn.LayerNorm(64))
    )
    model, _ = with_lora(LlamaForCausalLM(gelu), use_rslora=True)
    assert all(is_plain_lora(m) for m in model.modules() if hasattr(m, "lora_A"))
    assert fuse(decoder_layers(model), False) == {"LlamaMLP"}
    biased, _ = with_lora(
        LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)), bias="lora_only"
    )
    assert {
        n.split(".")[-1]
        for n, m in biased.named_modules()
        if hasattr(m, "lora_A") and not is_plain_lora(m)
    } == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    model, _ = with_lora(LlamaForCausalLM(config), use_dora=True)
    assert not any(map(is_plain_lora, model.modules()))
    assert fuse(decoder_layers(model), False) == {"LlamaMLP", "Linear"}


def test_kernels_that_fail_on_this_card_are_not_used(monkeypatch):
    """As if the CPU were a GPU: right terms pass, a wrong one and one that raises are named, before any layer is touched."""
    assert self_test.fails_here("cpu", 8, torch.bfloat16) is None
    right = kernels.swiglu
    monkeypatch.setattr(
        kernels,
        "swiglu",
        lambda g, *rest: right(g, *rest) * (1.1 if g.dtype == torch.bfloat16 else 1),
    )
    assert "error" in self_test.fails_here(
        "cpu", 8, torch.bfloat16
    ) and "against plain PyTorch" in self_test.fails_here("cpu", 8, torch.bfloat16)

    def rotate(*args):
        raise RuntimeError("no such card\nand more")

    monkeypatch.setattr(kernels, "swiglu", right)
    monkeypatch.setattr(kernels, "rotate", rotate)
    assert self_test.fails_here("cpu", 8, torch.bfloat16) == "rotate: RuntimeError: no such card"


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(150, 200, 8), (1100, 96, 24), (300, 256, 128), (300, 256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.gpu
def test_each_kernel_computes_its_term(rows, width, rank, dtype):
    """On a GPU, or with TRITON_INTERPRET=1 in fp32 on a CPU, against plain PyTorch in fp32."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, g, u, dm = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(4))
    a_s, dhs = (
        torch.randn(3, rank, width, device=device, dtype=dtype),
        torch.randn(3, rows, rank, device=device, dtype=dtype),
    )
    mask, lora = (
        torch.rand(rows, width + 9, device=device) < 0.9,
        (dhs[0], torch.randn(width, rank, device=device, dtype=dtype)),
    )
    q, angle = (
        torch.randn(2, rows, 6, 16, device=device, dtype=dtype).transpose(1, 2),
        torch.randn(2, rows, 8, device=device).repeat(1, 1, 2),
    )
    cases: list[tuple] = [
        (kernels.swiglu, g, u, lora, lora),
        (kernels.swiglu_backward, dm, g, u, lora, lora),
        (kernels.rotate, q, angle.cos().to(dtype), angle.sin().to(dtype)),
    ]
    for n in (1, 2, 3):  # LoRAs of one input
        drop = tuple(mask[:, at : at + width] for at in (5, 0, 9)[:n]), 1.7
        cases += [
            (kernels.lora_down, x, tuple(a_s[:n]), *drop),
            (kernels.grad_lora_a, tuple(dhs[:n]), x, *drop),
            (kernels.lora_grad_input, tuple(dhs[:n]), tuple(a_s[:n]), *drop),
        ]

    def compute(term, *args, to):
        out = term(
            *tree_map(
                lambda arg: (
                    arg.to(*to, copy=True)
                    if isinstance(arg, torch.Tensor) and arg.dtype != torch.bool
                    else arg
                ),
                args,
            )
        )
        return [o.cpu().float() for o in ((out,) if isinstance(out, torch.Tensor) else out)]

    assert kernels.on_triton(x)
    for term, *args in cases:
        ours = compute(term, *args, to=(device, dtype))
        on_cpu = tree_map(lambda arg: arg.cpu() if isinstance(arg, torch.Tensor) else arg, args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "on_triton", lambda x: False)
            exact = compute(term, *on_cpu, to=("cpu", torch.float32))
        for got, wanted in zip(ours, exact, strict=True):
            assert (got - wanted).norm() < (
                1e-6 if dtype == torch.float32 else 5e-3
            ) * wanted.norm(), term.__name__
