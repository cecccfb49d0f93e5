"""Functions of transformers that are replaced for the whole process, and the way back.

There is one. Everything else is replaced in a model's own modules, by fuse.py.
"""

from collections.abc import Callable
from types import ModuleType

from .fused_layers import FusedRotary

_ROTARY_ORIGINALS: dict[ModuleType, Callable] = {}


def is_rotary_patched(module: ModuleType) -> bool:
    return module in _ROTARY_ORIGINALS


def patch_rotary(module: ModuleType) -> None:
    """Replaces `apply_rotary_pos_emb` of a transformers model's module by `FusedRotary`.

    What: the global function of a module such as transformers.models.llama.modeling_llama. All of
    the process's models of this architecture call it from then on.
    Why: ours takes one kernel for queries and one for keys. Attention layers call the function by
    its global name, so no object of one model holds it.
    Seen: transformers 5.17 to 5.23 call apply_rotary_pos_emb(q, k, cos, sin) with q
    [B, Hq, T, D], k [B, Hkv, T, D], cos and sin [B, T, D]. Any other call, any other shape, and
    angles of another dtype (OLMo keeps them in fp32) go to the original.

    The caller first compares both functions (`fuse.fuse_rotary`). A second call does nothing.
    """
    if is_rotary_patched(module):
        return
    original = module.apply_rotary_pos_emb

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        fits = cos.shape == (q.shape[0], *q.shape[2:]) and cos.dtype == q.dtype
        if args or kwargs or not fits:
            return original(q, k, cos, sin, *args, **kwargs)
        return FusedRotary.apply(q, k, cos, sin)

    _ROTARY_ORIGINALS[module] = original
    module.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]


def restore_rotary(module: ModuleType) -> None:
    """Puts the original `apply_rotary_pos_emb` back. Does nothing where it was not replaced."""
    if is_rotary_patched(module):
        module.apply_rotary_pos_emb = _ROTARY_ORIGINALS.pop(module)  # type: ignore[attr-defined]
