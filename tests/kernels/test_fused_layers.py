"""Fused parts of a decoder layer: what PEFT and transformers compute, and what is left alone."""

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
from loop.kernels import lora_ops, self_test, triton_kernels
from loop.kernels.dropout import install_dropout
from loop.kernels.fuse import (
    choose_dequantized,
    fuse_norm,
    install_fused_parts,
    is_plain_lora,
    is_swiglu,
)
from loop.kernels.fused_layers import SharedForward
from loop.kernels.patches import is_rotary_patched, restore_rotary
from loop.model.activation_checkpointing import use_checkpointing
from loop.model.loading import load_base
from loop.model.structure import decoder_layers
from loop.monitor.kernel_profile import kernel_kind

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
    """What is compared with our rotary positions must be the library's own."""
    yield
    restore_rotary(modeling_llama)


def with_lora(base, dtype=torch.float32, dropout=0.1, device="cpu", **lora):
    """(the model with random LoRA weights, its dropout masks)"""
    base.requires_grad_(False)
    base.enable_input_require_grads()
    torch.manual_seed(1)
    defaults = {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=dropout, **defaults | lora)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(device, dtype)
    model.config.use_cache = False
    return model.train(), install_dropout(model, dropout, 0, device)


def loss_and_gradients(model, masks) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 320, (1, 90), generator=torch.Generator().manual_seed(0))
    masks.draw(0, [3, 4], torch.tensor([0, 40, 90]))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | gradients


def apart(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 14 + 1
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)


@pytest.mark.parametrize("cache_dequantized", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_fused_layers_compute_what_peft_computes(tmp_path, quantization, cache_dequantized):
    """With and without dropout, biases and checkpointing, and token by token."""
    torch.manual_seed(0)
    bias = quantization is None
    config = LlamaConfig(**SHAPE, initializer_range=0.2, attention_bias=bias, mlp_bias=bias)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin at 0, which nothing would miss
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    seen = []
    for fused in (False, True):
        base = load_base(str(tmp_path), torch.float32, "cpu", quantization=quantization)
        model, masks = with_lora(base)
        if fused:
            assert install_fused_parts(decoder_layers(model), cache_dequantized) == set()
        results = [loss_and_gradients(model, masks)]
        use_checkpointing(model)
        results.append(loss_and_gradients(model, masks))
        results.append(loss_and_gradients(model.eval(), masks))  # without dropout
        prompt = torch.arange(1, 9)[None]
        greedy = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
        seen.append((results, model.generate(prompt, **greedy)))
    (plain, plain_tokens), (ours, our_tokens) = seen
    assert max(map(apart, ours, plain)) < 3e-6 and torch.equal(our_tokens, plain_tokens)


def test_fewer_roundings_than_peft_in_bf16():
    """Both against fp32 from the same weights: ours is nearer, in all gradients together."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)).to(torch.bfloat16)
    exact = loss_and_gradients(*with_lora(copy.deepcopy(base).float()))
    distances = []
    for fused in (False, True):
        model, masks = with_lora(copy.deepcopy(base), torch.bfloat16)
        if fused:
            assert install_fused_parts(decoder_layers(model), False) == set()
        seen = loss_and_gradients(model, masks)
        squares = [(seen[n].float() - exact[n]).square().sum().item() for n in seen]
        distances.append(sum(squares) ** 0.5)
    assert 0 < distances[1] < distances[0]


def test_dequantised_weights_are_kept_where_there_is_room(tiny_base):
    model = load_base(tiny_base, torch.bfloat16, "cpu")
    small = 20 * 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)

    def chosen(free_bytes, use_cuda_graphs, setting="auto"):
        config = Config(base="x", data={"train": "x"}, cache_dequantized_weights=setting)
        return choose_dequantized(config, model, free_bytes, use_cuda_graphs)

    # None: a CPU, which has more than that
    for free_bytes, cached in ((None, True), (small, True), (small - 1, False)):
        assert chosen(free_bytes, False) is cached
        assert not chosen(free_bytes, True)
        assert chosen(free_bytes, True, setting=True)
        assert not chosen(free_bytes, False, setting=False)


class Scaled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_what_computes_something_else_is_left_alone():
    config = LlamaConfig(**SHAPE)
    gelu = LlamaConfig(**SHAPE, hidden_act="gelu")
    assert is_swiglu(LlamaMLP(config))
    assert not is_swiglu(LlamaMLP(gelu)) and not is_swiglu(nn.Linear(2, 2))
    gemma = LlamaConfig(**SHAPE, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")
    assert not is_swiglu(GemmaMLP(gemma))
    assert fuse_norm(LlamaRMSNorm(64))
    for norm in (GemmaRMSNorm(64), Scaled(64), nn.LayerNorm(64)):
        assert not fuse_norm(norm)
    model, _ = with_lora(LlamaForCausalLM(gelu), use_rslora=True)
    assert all(is_plain_lora(m) for m in model.modules() if hasattr(m, "lora_A"))
    assert install_fused_parts(decoder_layers(model), False) == {"LlamaMLP"}
    with_bias = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    biased, _ = with_lora(with_bias, bias="lora_only")
    loras = {n.split(".")[-1]: m for n, m in biased.named_modules() if hasattr(m, "lora_A")}
    others = {name for name, module in loras.items() if not is_plain_lora(module)}
    assert others == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model, _ = with_lora(LlamaForCausalLM(config), use_dora=True)
    assert not any(map(is_plain_lora, model.modules()))
    assert install_fused_parts(decoder_layers(model), False) == {"LlamaMLP", "Linear"}


def test_rotary_positions_that_differ_are_left_alone(monkeypatch):
    model, _ = with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    original = modeling_llama.apply_rotary_pos_emb

    def swapped(q, k, cos, sin):
        return original(q, k, sin, cos)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", swapped)
    assert install_fused_parts(decoder_layers(model), False) == {"apply_rotary_pos_emb"}
    assert not is_rotary_patched(modeling_llama)


class Doubled(torch.autograd.Function):
    """For each of the layers x + x; counts its calls."""

    calls = 0

    @staticmethod
    def forward(ctx, linears, x, *lora):
        Doubled.calls += 1
        return tuple(x + x for _ in linears)


def test_a_shared_forward_computes_once_for_an_input_and_holds_nothing_afterwards(monkeypatch):
    class Layer:
        lora = ()

    monkeypatch.setattr(Doubled, "calls", 0)
    shared = SharedForward([Layer(), Layer(), Layer()], Doubled)
    x, equal = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    for number in range(3):
        assert torch.equal(shared.fetch(x, number), x + x) and Doubled.calls == 1
    assert shared.input is None and shared.outputs == []
    shared.fetch(x, 0)
    shared.fetch(equal, 1)  # another object, though it holds the same: computed for it
    assert Doubled.calls == 3
    shared.fetch(equal, 1)  # fetched already: computed again
    assert Doubled.calls == 4
    shared.fetch(equal, 0)
    shared.fetch(equal, 2)
    assert Doubled.calls == 4 and shared.input is None


def test_kernels_that_fail_on_this_card_are_not_used(monkeypatch):
    """As if the CPU were a GPU: right operations pass, a wrong one and one that raises are told."""
    assert self_test.find_failing_kernel("cpu", 8, torch.bfloat16) is None
    right = self_test.swiglu

    def swiglu(gate, *rest):
        return right(gate, *rest) * (1.1 if gate.dtype == torch.bfloat16 else 1)

    def rotate(*args):
        raise RuntimeError("no such card\nand more")

    monkeypatch.setattr(self_test, "swiglu", swiglu)
    failure = self_test.find_failing_kernel("cpu", 8, torch.bfloat16)
    assert failure.startswith("swiglu: error ") and failure.endswith("against plain PyTorch")
    monkeypatch.setattr(self_test, "swiglu", right)
    monkeypatch.setattr(self_test, "rotate", rotate)
    failure = self_test.find_failing_kernel("cpu", 8, torch.bfloat16)
    assert failure == "rotate: RuntimeError: no such card"


def test_every_kernel_has_its_kind_in_a_profile():
    names = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
    assert sorted(names) == sorted(f"{op}_kernel" for op in lora_ops.FUSED_OPS)
    kinds = {name: kernel_kind(name) for name in names}
    assert set(kinds.values()) == {"LoRA with dropout", "SwiGLU, rotary, norms"}, kinds


def op_cases(rows, width, rank, device, dtype) -> list[tuple]:
    """(operation, its arguments) for each kernel, and for one, two and three LoRAs of an input."""

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    torch.manual_seed(0)
    x, gate, up, d_out = (randn(rows, width) for _ in range(4))
    lora_as, dhs = randn(3, rank, width), randn(3, rows, rank)
    mask = torch.rand(rows, width + 9, device=device) < 0.9
    lora = (dhs[0], randn(width, rank))
    q = randn(2, rows, 6, 16).transpose(1, 2)
    angle = torch.randn(2, rows, 8, device=device).repeat(1, 1, 2)
    # Columns of a wider product, for a token of each row.
    step = randn(rows, 104)[:, :96].view(rows, 1, 6, 16).transpose(1, 2)
    one = torch.randn(rows, 1, 8, device=device).repeat(1, 1, 2)
    cases: list[tuple] = [
        (lora_ops.swiglu, gate, up, lora, lora),
        (lora_ops.swiglu_backward, d_out, gate, up, lora, lora),
        (lora_ops.swiglu_joint, randn(rows, 2 * width + rank), randn(2 * width, rank)),
        (lora_ops.rotate, step, one.cos().to(dtype), one.sin().to(dtype)),
        (lora_ops.rotate, q, angle.cos().to(dtype), angle.sin().to(dtype)),
    ]
    for n in (1, 2, 3):
        dropout = tuple(mask[:, start : start + width] for start in (5, 0, 9)[:n]), 1.7
        cases += [
            (lora_ops.lora_down, x, tuple(lora_as[:n]), *dropout),
            (lora_ops.grad_lora_a, tuple(dhs[:n]), x, *dropout),
            (lora_ops.lora_grad_input, tuple(dhs[:n]), tuple(lora_as[:n]), *dropout),
        ]
    return cases


def run_op(op, args, device, dtype) -> list[torch.Tensor]:
    def copied(arg):
        if not isinstance(arg, torch.Tensor):
            return arg
        return arg.to(device) if arg.dtype == torch.bool else arg.to(device, dtype, copy=True)

    out = op(*tree_map(copied, args))
    return [part.cpu().float() for part in ((out,) if isinstance(out, torch.Tensor) else out)]


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(150, 200, 8), (1100, 96, 24), (300, 256, 128), (300, 256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.gpu
def test_each_kernel_computes_its_term(rows, width, rank, dtype):
    """On a GPU, or with TRITON_INTERPRET=1 in fp32 on a CPU, against plain PyTorch in fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    cases = op_cases(rows, width, rank, device, dtype)
    assert lora_ops.on_triton(cases[0][1])
    for op, *args in cases:
        ours = run_op(op, args, device, dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora_ops, "on_triton", lambda x: False)
            exact = run_op(op, args, "cpu", torch.float32)
        for got, wanted in zip(ours, exact, strict=True):
            assert (got - wanted).norm() < bound * wanted.norm(), op.__name__
