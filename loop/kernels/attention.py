"""Attention over a packed row: several documents in one flattened row, none of which sees another.

Each backend of `ATTENTION_BACKENDS` computes the same thing. To add one, write the function that
loads it and its entry at the end of this file. No backend takes a padding mask: a mask of the wrong
shape is the usual way in which packed documents leak into one another (trl#3067), while boundaries
that are an argument of the kernel can't be forgotten.
"""

import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ..config.device import user_cache

# attend(query, key, value, cu_seqlens, max_seqlen, scale) -> output; shapes as in packed_attention
Attend = Callable[..., torch.Tensor]


class AttentionError(RuntimeError):
    """The configured attention can't run here, or was called without document boundaries."""


# ---- the backends: each function imports a kernel and gives it the signature of Attend


@functools.cache
def load_flash_attn_4() -> Attend:
    """FlashAttention-4 (arXiv 2603.05451), for Hopper and newer, compiled at its first use."""
    if not importlib.util.find_spec("cutlass"):  # flash-attn 2 has a folder of that name, too
        raise ImportError("./launch.sh setup --flash-attn-4 installs it")
    # Without the cache each process compiles anew, for some 8 s. Not in /tmp, where all may write.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    cache = str(user_cache() / "flash_attn_4")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", cache)
    # Its compiler warns of arguments that are not used.
    warnings.filterwarnings("ignore", module=r"cutlass\.")
    from flash_attn.cute.interface import flash_attn_varlen_func

    def attend(query, key, value, cu_seqlens, max_seqlen, scale):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=True,
            # Otherwise the backward pass adds in any order.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )[0]

    return attend


@functools.cache
def load_flash_attn_2() -> Attend:
    """FlashAttention-2 (Dao, arXiv 2307.08691)."""
    from flash_attn import flash_attn_varlen_func

    def attend(query, key, value, cu_seqlens, max_seqlen, scale):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=scale,
            causal=True,
            # Otherwise the backward pass adds in any order.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return attend


@functools.cache
def load_torch_varlen() -> Attend:
    """FlashAttention-2 as shipped by torch >= 2.10.

    Its signature differs by version: torch 2.10 has `is_causal`, torch 2.13 has `window_size` and
    `enable_gqa`.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any]
    if "window_size" in known:
        causal = {"window_size": (-1, 0)}
    else:
        causal = {"is_causal": True}

    def attend(query, key, value, cu_seqlens, max_seqlen, scale):
        options = dict(causal)
        group_size = query.shape[1] // key.shape[1]
        if key.shape[1] != query.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:  # each key-value head serves a group of query heads: repeat it
                key = key.repeat_interleave(group_size, dim=1)
                value = value.repeat_interleave(group_size, dim=1)
        if "scale" in known:
            options["scale"] = scale
        elif scale is not None:  # the kernel itself divides by sqrt(head_dim)
            query = query * (scale * query.shape[-1] ** 0.5)
        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
        )

    return attend


def load_sdpa() -> Attend:
    """torch's attention, once per document: slower than the others, but it runs everywhere."""
    return sdpa_per_document


def sdpa_per_document(query, key, value, cu_seqlens, max_seqlen, scale):
    # tolist() waits for the GPU: one more reason why this backend is the last choice there.
    bounds = cu_seqlens.tolist()
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        if end == start:
            continue  # cu_seqlens may be padded by repeating its last entry
        # [1, H, L, D]
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


# ---- the table


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute packed attention."""

    name: str  # as in `attention=` and in the rows of ./launch.sh check
    load: Callable[[], Attend]  # raises where the backend isn't installed or can't be imported
    transformers_name: str  # for attn_implementation
    min_capability: int | None  # major CUDA compute capability; None: runs on CPUs as well
    package: str = "torch"  # whose version is reported
    half_precision_only: bool = True  # takes bf16 and fp16 only
    optional_hardware: bool = False  # too old a GPU for it is not worth a warning
    fallback_note: str = ""  # what it costs to have this one instead of a faster one


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {}  # in the order in which "auto" tries them


def register_backend(backend: AttentionBackend) -> None:
    """Makes a backend available to packed_attention, choose_backend, the check and transformers.

    Its transformers_name must be a name of our own. transformers builds no mask for a name that it
    has no mask function for, which is what we want. It takes any name with "flash" in it for one
    of its own.
    """
    ATTENTION_BACKENDS[backend.name] = backend
    AttentionInterface.register(
        backend.transformers_name, functools.partial(_attend_for_transformers, backend.name)
    )


def packed_attention(
    query, key, value, cu_seqlens, max_seqlen: int, backend: str, scale: float | None = None
):
    """Causal attention of each document of a packed row over itself alone.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D], where Hq is a multiple of Hkv (grouped queries).
        value: [T, Hkv, Dv], where Dv is at most D (DeepSeek's values are narrower than its keys).
        cu_seqlens: int32 [n + 1], the documents' boundaries from 0 to T, on the tensors' device.
        max_seqlen: an upper bound of the documents' lengths.
        backend: a name in ATTENTION_BACKENDS.
        scale: of the scores, by default 1/sqrt(D).

    Returns [T, Hq, Dv] in the dtype of query, which must be bf16 or fp16 for all backends but sdpa.
    Raises AttentionError for an unknown backend.
    """
    if backend not in ATTENTION_BACKENDS:
        names = ", ".join(ATTENTION_BACKENDS)
        raise AttentionError(f"attention={backend}: unknown, one of {names} is possible")
    attend = ATTENTION_BACKENDS[backend].load()
    width = value.shape[-1]
    if width < query.shape[-1]:  # kernels take one head size; zeros change no other column
        value = F.pad(value, (0, query.shape[-1] - width))
    return attend(query, key, value, cu_seqlens, max_seqlen, scale)[..., :width]


def _attend_for_transformers(
    backend: str, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """Packed attention with the signature that transformers calls.

    query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None). The model's call
    passes cu_seqlens and max_seqlen through. Raises AttentionError for anything that packed
    attention does not compute.
    """
    one_row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if kwargs.get("cu_seqlens") is None or attention_mask is not None or not one_row:
        raise AttentionError(
            f"{type(module).__name__}: packed attention takes one row with cu_seqlens, without a "
            "mask or a cache"
        )
    window = kwargs.get("sliding_window") or kwargs["max_seqlen"]
    windowed = f"a sliding window of {window} tokens"
    parts = {
        "dropout": dropout,
        "soft caps": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux") is not None,
        windowed: window < kwargs["max_seqlen"],
    }
    asked = [name for name, wanted in parts.items() if wanted]
    if asked:
        remedy = f"; set max_seq_len={window}" if asked == [windowed] else ""
        raise AttentionError(
            f"{type(module).__name__}: attention with {' and '.join(asked)} is not supported"
            f"{remedy}"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    out = packed_attention(
        q, k, v, kwargs["cu_seqlens"], kwargs["max_seqlen"], backend, scale=scaling
    )
    return out.unsqueeze(0), None


# Fastest first, on rows of thousands of tokens. On the check's small rows speed is launch overhead.
for _backend in (
    AttentionBackend(
        "flash_attn_4",
        load_flash_attn_4,
        "packed_fa4",
        min_capability=9,
        package="flash-attn-4",
        optional_hardware=True,
    ),
    AttentionBackend(
        "flash_attn", load_flash_attn_2, "packed_fa2", min_capability=8, package="flash-attn"
    ),
    AttentionBackend(
        "varlen",
        load_torch_varlen,
        "packed_varlen",
        min_capability=8,
        fallback_note="the same algorithm, from torch",
    ),
    AttentionBackend(
        "sdpa",
        load_sdpa,
        "packed_per_document",
        min_capability=None,
        half_precision_only=False,
        fallback_note="costs a kernel call for each document",
    ),
):
    register_backend(_backend)
