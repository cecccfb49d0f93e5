"""Each attention backend is right and keeps documents apart. On a CPU that is SDPA; the GPU's kernels carry the gpu mark."""

import math

import pytest
import torch

from loop.kernels.attention import AttentionError, packed_attention
from loop.kernels.attention_backends import available_backends, choose_backend

BOUNDS = [
    0,
    1,
    18,
    18,
    60,
    96,
]  # a document of one token, an empty one as cu_seqlens may be padded, unequal ones
BACKENDS = [
    "sdpa",
    *(
        pytest.param(name, marks=pytest.mark.gpu)
        for name in ("varlen", "flash_attn", "flash_attn_4")
    ),
]


def plain_attention(q, k, v, bounds):
    """Softmax attention of each document by the formula, in float64. q [T, Hq, D], k and v [T, Hkv, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) / math.sqrt(q.shape[-1])
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        parts.append(
            torch.einsum(
                "hij,jhd->ihd", scores.masked_fill(future, -math.inf).softmax(-1), v[start:end]
            )
        )
    return torch.cat(parts)


def inputs(backend, heads, kv_heads, head_dim, dtype):
    device = "cpu" if backend == "sdpa" and not torch.cuda.is_available() else "cuda"
    if available_backends(device)[backend].startswith("missing"):
        pytest.skip(f"{backend}: {available_backends(device)[backend]}")
    torch.manual_seed(0)
    q = torch.randn(BOUNDS[-1], heads, head_dim, device=device, dtype=dtype)
    k, v = (
        torch.randn(BOUNDS[-1], kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2)
    )
    return [x.requires_grad_(True) for x in (q, k, v)], torch.tensor(
        BOUNDS, dtype=torch.int32, device=device
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 64), (4, 1, 128)])
def test_forward_and_backward_are_plain_attentions(backend, heads, kv_heads, head_dim):
    dtype, bound = (torch.float32, 1e-5) if backend == "sdpa" else (torch.bfloat16, 1e-2)
    (q, k, v), cu_seqlens = inputs(backend, heads, kv_heads, head_dim, dtype)
    out = packed_attention(q, k, v, cu_seqlens, 64, backend)
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

    def outputs_of_the_last(q, k, v):
        out = packed_attention(q, k, v, cu_seqlens, 64, backend)
        grads = torch.autograd.grad(out[BOUNDS[-2] :].sum(), (q, k, v))
        return [out[BOUNDS[-2] :], *(g[BOUNDS[-2] :] for g in grads)], [
            g[: BOUNDS[-2]] for g in grads
        ]

    before, foreign = outputs_of_the_last(q, k, v)
    with torch.no_grad():
        for x in (q, k, v):
            x[: BOUNDS[-2]] = torch.randn_like(x[: BOUNDS[-2]])
    after, _ = outputs_of_the_last(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all((g == 0).all() for g in foreign)  # and its loss has no gradient in other documents


def test_what_cannot_run_is_refused_and_said():
    with pytest.raises(AttentionError, match="attention=varlen: missing: needs an NVIDIA GPU"):
        choose_backend("varlen", "cpu", torch.bfloat16)
    backend, remark = choose_backend("auto", "cpu", torch.float32)
    assert backend == "sdpa" and "flash_attn missing" in remark


def test_a_leaking_backend_is_refused(monkeypatch):
    """The classic: one causal mask over the whole row."""
    import loop.attention

    monkeypatch.setattr(
        loop.attention,
        "_sdpa_per_document",
        lambda q, k, v, cu, scale: plain_attention(q.float(), k.float(), v.float(), [0, len(q)]),
    )
    with pytest.raises(AttentionError, match="leaks between documents"):
        choose_backend("sdpa", "cpu", torch.bfloat16)


def test_a_row_without_boundaries_or_with_a_mask_is_refused(tiny_base):
    from loop.kernels.attention import IMPLEMENTATIONS
    from loop.model.loading import load_base

    model = load_base(
        tiny_base, torch.float32, "cpu", quantized=False, attention=IMPLEMENTATIONS["sdpa"]
    )
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(AttentionError, match="cu_seqlens"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(AttentionError, match="without a mask or a cache"):
        model(
            input_ids=ids.repeat(2, 1),
            use_cache=False,
            cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
            max_seqlen=4,
        )
