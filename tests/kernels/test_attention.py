"""Each attention backend is right and keeps documents apart.

On a CPU that is SDPA. The GPU's kernels carry the gpu mark.
"""

import dataclasses
import math

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from loop.config.schema import Config
from loop.kernels.attention import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    AttentionError,
    packed_attention,
    register_backend,
)
from loop.kernels.attention_backends import available_backends, choose_backend
from loop.model.loading import load_base

# Unequal documents: one of a single token, and an empty one, as cu_seqlens may be padded.
BOUNDS = [0, 1, 18, 18, 60, 96]
GPU_BACKENDS = ("varlen", "flash_attn", "flash_attn_4")
BACKENDS = ["sdpa", *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS)]


def plain_attention(q, k, v, bounds):
    """Softmax attention of each document by the formula. q [T, Hq, D], k and v [T, Hkv, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) / math.sqrt(q.shape[-1])
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", weights, v[start:end]))
    return torch.cat(parts)


def inputs(backend, heads, kv_heads, head_dim, dtype):
    on_cpu = ATTENTION_BACKENDS[backend].min_capability is None and not torch.cuda.is_available()
    device = "cpu" if on_cpu else "cuda"
    version = available_backends(device)[backend]
    if version.startswith("missing"):
        pytest.skip(f"{backend}: {version}")
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(BOUNDS[-1], n, head_dim, device=device, dtype=dtype).requires_grad_(True)
        for n in (heads, kv_heads, kv_heads)
    )
    return [q, k, v], torch.tensor(BOUNDS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(4, 4, 64, 64), (8, 2, 64, 64), (4, 1, 128, 128), (4, 2, 64, 40)],
)
def test_forward_and_backward_are_plain_attentions(backend, heads, kv_heads, head_dim, value_dim):
    dtype, bound = (torch.float32, 1e-5) if backend == "sdpa" else (torch.bfloat16, 1e-2)
    (q, k, v), cu_seqlens = inputs(backend, heads, kv_heads, head_dim, dtype)
    v = v[..., :value_dim].detach().requires_grad_(True)
    with torch.no_grad():  # a scale of the model's own is that of other queries
        scaled = packed_attention(q, k, v, cu_seqlens, 64, backend, scale=3 * head_dim**-0.5)
        thrice = packed_attention(3 * q, k, v, cu_seqlens, 64, backend)
        assert (scaled.double() - thrice.double()).norm() / thrice.double().norm() < bound
    out = packed_attention(q, k, v, cu_seqlens, 64, backend)
    assert out.shape == (BOUNDS[-1], heads, value_dim)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
    plain = plain_attention(*exact, BOUNDS)
    plain_grads = torch.autograd.grad((plain * weight.double()).sum(), exact)
    for ours, theirs in zip((out, *grads), (plain, *plain_grads)):
        assert (ours.double() - theirs).norm() / theirs.norm() < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_document_moves_another_by_a_bit(backend):
    (q, k, v), cu_seqlens = inputs(backend, 8, 2, 64, torch.bfloat16)
    last = BOUNDS[-2]  # where the last document begins

    def outputs_of_the_last(q, k, v):
        out = packed_attention(q, k, v, cu_seqlens, 64, backend)
        grads = torch.autograd.grad(out[last:].sum(), (q, k, v))
        return [out[last:], *(g[last:] for g in grads)], [g[:last] for g in grads]

    before, foreign = outputs_of_the_last(q, k, v)
    with torch.no_grad():
        for x in (q, k, v):
            x[:last] = torch.randn_like(x[:last])
    after, _ = outputs_of_the_last(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all((g == 0).all() for g in foreign)  # and its loss has no gradient in other documents


def test_what_cannot_run_is_refused_and_said():
    with pytest.raises(AttentionError, match="attention=varlen: missing: needs an NVIDIA GPU"):
        choose_backend("varlen", "cpu", torch.bfloat16)
    backend, note = choose_backend("auto", "cpu", torch.float32)
    assert backend == "sdpa" and "flash_attn missing" in note
    q = torch.randn(4, 2, 8)
    with pytest.raises(AttentionError, match="attention=nonesuch: unknown, one of flash_attn_4, "):
        packed_attention(q, q, q, torch.tensor([0, 4]), 4, "nonesuch")


def attend_across_documents(query, key, value, cu_seqlens, max_seqlen, scale):
    """The classic mistake: one causal mask over the full row."""
    return plain_attention(query.float(), key.float(), value.float(), [0, len(query)])


def test_a_leaking_backend_is_refused(monkeypatch):
    leaking = dataclasses.replace(ATTENTION_BACKENDS["sdpa"], load=lambda: attend_across_documents)
    monkeypatch.setitem(ATTENTION_BACKENDS, "sdpa", leaking)
    with pytest.raises(AttentionError, match="leaks between documents"):
        choose_backend("sdpa", "cpu", torch.bfloat16)


def attend_by_the_formula(query, key, value, cu_seqlens, max_seqlen, scale):
    """A backend as somebody else would write it."""
    assert scale is None or scale == query.shape[-1] ** -0.5
    out = plain_attention(query.float(), key.float(), value.float(), cu_seqlens.tolist())
    return out.to(query.dtype)


@pytest.fixture
def toy_backend():
    """Registers a backend from outside of the package; the table is restored after the test."""
    before = dict(ATTENTION_BACKENDS)
    register_backend(
        AttentionBackend(
            "toy",
            load=lambda: attend_by_the_formula,
            transformers_name="packed_toy",
            min_capability=None,
            half_precision_only=False,
            fallback_note="a toy",
        )
    )
    yield "toy"
    ATTENTION_BACKENDS.clear()
    ATTENTION_BACKENDS.update(before)
    AttentionInterface._global_mapping.pop("packed_toy")


def test_a_backend_registered_from_outside_is_chosen_and_runs(toy_backend):
    assert available_backends("cpu")[toy_backend] == f"torch {torch.__version__}"
    note = f"attention: toy (torch {torch.__version__})"
    assert choose_backend(toy_backend, "cpu", torch.float32) == (toy_backend, note)
    assert choose_backend("auto", "cpu", torch.float32)[0] == "sdpa"  # which is tried before it
    (q, k, v), cu_seqlens = inputs(toy_backend, 8, 2, 64, torch.float32)
    ours, theirs = (packed_attention(q, k, v, cu_seqlens, 64, b) for b in (toy_backend, "sdpa"))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_auto_falls_back_on_a_registered_backend(toy_backend, monkeypatch):
    def missing():
        raise ImportError("not built here")

    sdpa = ATTENTION_BACKENDS["sdpa"]
    monkeypatch.setitem(ATTENTION_BACKENDS, "sdpa", dataclasses.replace(sdpa, load=missing))
    backend, note = choose_backend("auto", "cpu", torch.float32)
    assert backend == toy_backend
    assert "sdpa missing: not built here" in note and note.endswith("instead toy: a toy")


def test_a_model_runs_on_a_registered_backend(toy_backend):
    """transformers finds it by its name, and it gets the documents' boundaries."""
    ids = torch.randint(64, (1, 10), generator=torch.Generator().manual_seed(0))
    boundaries = {"cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32), "max_seqlen": 6}
    logits = []
    for name in (toy_backend, "sdpa"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation=ATTENTION_BACKENDS[name].transformers_name,
        )
        model = LlamaForCausalLM(config)
        logits.append(model(input_ids=ids, use_cache=False, **boundaries).logits)
    assert torch.allclose(*logits, atol=1e-5)


def test_the_configuration_takes_every_backend_of_the_table():
    for name in ("auto", *ATTENTION_BACKENDS):
        assert Config(base="x", data={"train": "x"}, attention=name).attention == name


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dropout": 0.1}, "attention with dropout is not supported$"),
        ({"softcap": 50.0}, "attention with soft caps is not supported$"),
        ({"s_aux": torch.zeros(2)}, "attention with sinks is not supported$"),
        ({"sliding_window": 3}, "a sliding window of 3 tokens is not supported; set max_seq_len=3"),
        ({"sliding_window": 3, "softcap": 50.0}, "soft caps and a sliding .* not supported$"),
        ({"sliding_window": 4, "softcap": None, "s_aux": None}, None),
    ],
)
def test_what_packed_attention_does_not_compute_is_refused(asked, words):
    attend = AttentionInterface()[ATTENTION_BACKENDS["sdpa"].transformers_name]
    q = torch.randn(1, 2, 4, 8)
    boundaries = {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4}
    if words is None:
        assert attend(None, q, q, q, None, **boundaries, **asked)[0].shape == (1, 4, 2, 8)
    else:
        with pytest.raises(AttentionError, match=words):
            attend(None, q, q, q, None, **boundaries, **asked)


def test_a_row_without_boundaries_or_with_a_mask_is_refused(tiny_base):
    attention = ATTENTION_BACKENDS["sdpa"].transformers_name
    model = load_base(tiny_base, torch.float32, "cpu", quantization=None, attention=attention)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(AttentionError, match="cu_seqlens"):
        model(input_ids=ids, use_cache=False)
    boundaries = {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4}
    with pytest.raises(AttentionError, match="without a mask or a cache"):
        model(input_ids=ids.repeat(2, 1), use_cache=False, **boundaries)
