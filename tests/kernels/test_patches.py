"""The replaced functions of transformers, and the way back."""

from types import ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama

from loop.kernels.patches import is_rotary_patched, patch_rotary, restore_rotary


@pytest.fixture
def module():
    """A module of its own with the library's function, so that nothing else is touched."""
    module = ModuleType("modeling_toy")
    module.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb
    yield module
    restore_rotary(module)


def inputs(head_dim=16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 8, head_dim, generator=generator)
    k = torch.randn(1, 2, 8, head_dim, generator=generator)
    angle = torch.rand(1, 8, head_dim // 2, generator=generator).repeat(1, 1, 2)
    return q, k, angle.cos(), angle.sin()


def test_the_patch_computes_the_same_and_the_way_back_leaves_nothing(module):
    original = module.apply_rotary_pos_emb
    patch_rotary(module)
    patched = module.apply_rotary_pos_emb
    assert is_rotary_patched(module) and patched is not original
    assert all(map(torch.allclose, patched(*inputs()), original(*inputs())))
    patch_rotary(module)
    assert module.apply_rotary_pos_emb is patched  # not a patch of the patch
    restore_rotary(module)
    assert module.apply_rotary_pos_emb is original and not is_rotary_patched(module)
    restore_rotary(module)
    assert module.apply_rotary_pos_emb is original
    patch_rotary(module)
    assert is_rotary_patched(module)  # again, after a way back


def test_a_call_of_another_form_goes_to_the_original(module):
    calls = []

    def original(q, k, cos, sin, *args, **kwargs):
        calls.append((args, kwargs))
        return q, k

    module.apply_rotary_pos_emb = original
    patch_rotary(module)
    q, k, cos, sin = inputs()
    module.apply_rotary_pos_emb(q, k, cos, sin)
    assert calls == []
    module.apply_rotary_pos_emb(q, k, cos, sin, 2)
    module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    module.apply_rotary_pos_emb(q, k, cos[..., :8], sin[..., :8])  # a part of the head is turned
    module.apply_rotary_pos_emb(q.bfloat16(), k.bfloat16(), cos, sin)  # as OLMo's in bf16
    assert calls == [((2,), {}), ((), {"unsqueeze_dim": 2}), ((), {}), ((), {})]


def test_modules_are_patched_one_by_one(module):
    other = ModuleType("modeling_other")
    other.apply_rotary_pos_emb = module.apply_rotary_pos_emb
    patch_rotary(module)
    assert not is_rotary_patched(other) and not is_rotary_patched(modeling_llama)
    assert other.apply_rotary_pos_emb is modeling_llama.apply_rotary_pos_emb
