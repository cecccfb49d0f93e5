"""Attention over a packed row: several documents lie in one flattened row and none may see another.

Four backends compute the same thing. `flash_attn_4` (arXiv 2603.05451; for Hopper and newer, compiled at its first use), `flash_attn` (Dao,
arXiv 2307.08691) and `varlen` (the same kernel as shipped by torch >= 2.10) take the document boundaries `cu_seqlens` themselves; `sdpa` calls
torch's attention once a document, which is slower and runs everywhere. There is no backend that takes a padding mask: a mask of the wrong shape
is the usual way in which packed documents leak into one another (trl#3910), and boundaries that are an argument of the kernel can't be forgotten.
"""

import functools
import importlib.util
import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

BACKENDS = (
    "flash_attn_4",
    "flash_attn",
    "varlen",
    "sdpa",
)  # fastest first, on rows of thousands of tokens


class AttentionError(RuntimeError):
    """The attention that was asked for can't run here, or was called without document boundaries."""


@functools.cache
def _flash_attn_4():
    if not importlib.util.find_spec("cutlass"):  # flash-attn 2 has a folder of that name, too
        raise ImportError("./launch.sh setup --flash-attn-4 installs it")
    os.environ.setdefault(
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1"
    )  # or each process would compile anew, for some 8 s
    cache = Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    )  # not /tmp, where all may write
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache / "flash_attn_4"))
    warnings.filterwarnings(
        "ignore", module=r"cutlass\."
    )  # of its compiler, about arguments that are not used
    from flash_attn.cute.interface import flash_attn_varlen_func

    return flash_attn_varlen_func


@functools.cache
def _flash_attn_2():
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


@functools.cache
def _torch_varlen():
    """torch's varlen kernel with one signature: torch 2.10 said `is_causal`, 2.13 says `window_size` and `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    grouped = "enable_gqa" in known

    def attend(query, key, value, cu_seqlens, max_seqlen, scale):
        if key.shape[1] != query.shape[1]:
            if grouped:
                causal["enable_gqa"] = True
            else:  # each key-value head serves a group of query heads: repeat it
                key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
                value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        scaled = {"scale": scale} if "scale" in known else {}
        if not scaled and scale is not None:
            query = query * (
                scale * query.shape[-1] ** 0.5
            )  # the kernel divides by sqrt(head_dim) itself
        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **scaled, **causal
        )

    return attend


LOADERS = {
    "flash_attn_4": _flash_attn_4,
    "flash_attn": _flash_attn_2,
    "varlen": _torch_varlen,
}  # each raises where it can't be had


def _sdpa_per_document(query, key, value, cu_seqlens, scale):
    bounds = (
        cu_seqlens.tolist()
    )  # waits for the GPU: one more reason why this is the last choice there
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        if end == start:
            continue  # cu_seqlens may be padded by repeating its last entry
        q, k, v = (
            x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value)
        )  # [1, H, L, D]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def packed_attention(
    query, key, value, cu_seqlens, max_seqlen: int, backend: str, scale: float | None = None
):
    """Causal attention of each document of a packed row over itself alone.

    query [T, Hq, D], key and value [T, Hkv, D] with Hq a multiple of Hkv (grouped queries); cu_seqlens int32 [n + 1], the
    documents' boundaries from 0 to T on the tensors' device; max_seqlen, an upper bound of their lengths; scale, by default
    1/sqrt(D). Returns [T, Hq, D] in the dtype of query (all but sdpa: bf16 or fp16 only)."""
    ordered = (
        torch.are_deterministic_algorithms_enabled()
    )  # flash attention's backward pass adds in any order otherwise
    if backend == "flash_attn_4":
        return _flash_attn_4()(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=True,
            deterministic=ordered,
        )[0]
    if backend == "flash_attn":
        return _flash_attn_2()(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=scale,
            causal=True,
            deterministic=ordered,
        )
    if backend == "varlen":
        return _torch_varlen()(query, key, value, cu_seqlens, max_seqlen, scale)
    if backend == "sdpa":
        return _sdpa_per_document(query, key, value, cu_seqlens, scale)
    raise AttentionError(f"attention={backend}: unknown, one of {', '.join(BACKENDS)} is possible")


def _for_transformers(
    backend: str, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """What transformers calls: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None)."""
    if (
        kwargs.get("cu_seqlens") is None
        or attention_mask is not None
        or query.shape[0] != 1
        or query.shape[2] != key.shape[2]
    ):
        raise AttentionError(
            "packed attention takes one row with cu_seqlens, without a mask or a cache"
        )
    window = kwargs.get("sliding_window") or kwargs["max_seqlen"]
    if (
        dropout
        or kwargs.get("softcap")
        or kwargs.get("s_aux") is not None
        or window < kwargs["max_seqlen"]
    ):
        raise AttentionError(
            f"{type(module).__name__}: attention with dropout, soft caps, sinks or a sliding window is not supported"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    out = packed_attention(
        q, k, v, kwargs["cu_seqlens"], kwargs["max_seqlen"], backend, scale=scaling
    )
    return out.unsqueeze(0), None


# Names of our own. transformers builds no mask for a name that it has no mask function for, which is what we want; it takes any
# name with "flash" in it for one of its own, so ours has none.
IMPLEMENTATIONS = {
    "flash_attn_4": "packed_fa4",
    "flash_attn": "packed_fa2",
    "varlen": "packed_varlen",
    "sdpa": "packed_sdpa",
}


for _backend, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, functools.partial(_for_transformers, _backend))
