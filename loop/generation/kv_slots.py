"""Keys and values of notes that are being written: a slot for each, with a length of its own.

Prompts come packed, several in one row, by the kernel that training uses; their keys and values are
put into slots. Then each step adds one token to every slot. Slots are filled from the left, so
another note can take a slot at any time, and nothing in it is padding.
"""

import functools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ..kernels.attention import AttentionError, packed_attention

SLOT_ATTENTION = "note_slots"  # for attn_implementation; transformers makes no mask for this name
MULTIPLE = 64  # tokens; kernels want aligned rows
# flash-attn is not installed, was built for another torch, or has no kernel for these heads.
FLASH_REFUSES = (ImportError, OSError, RuntimeError, TypeError, ValueError, AssertionError)


class KVSlots:
    """The keys and values of all slots, and attention over them.

    lengths: int32 [slots], the tokens of each slot before the one that is computed now.
    """

    def __init__(self, num_slots: int, capacity: int, backend: str, flash: bool, device) -> None:
        """Memory for keys and values is taken at the first prompts.

        Args:
            num_slots: notes that are written at a time.
            capacity: tokens that a slot can hold, prompt included.
            backend: of packed attention, for the prompts.
            flash: whether steps take flash-attn's kernel, else torch's attention with a mask.
            device: of the model.
        """
        self.shape = num_slots, -(-capacity // MULTIPLE) * MULTIPLE
        self.backend = backend
        self.flash = flash
        self.lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.all_slots = torch.arange(num_slots, device=device)
        self.places = torch.arange(self.shape[1], device=device)
        # Of each attention module: keys and values, [slots, capacity, Hkv, D].
        self.layers: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.prompts: PackedPrompts | None = None  # while prompts are computed
        self.mask: torch.Tensor | None = None  # of a step, bool [slots, 1, 1, tokens]

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    def begin_step(self, longest: int) -> None:
        """Before a token for all slots. longest: a bound of their lengths."""
        self.prompts = None
        if not self.flash:
            tokens = min(self.shape[1], -(-(longest + 1) // MULTIPLE) * MULTIPLE)
            self.mask = (self.places[:tokens] <= self.lengths[:, None])[:, None, None]

    def attend(self, module, query, key, value, scale: float | None) -> torch.Tensor:
        """Stores keys and values of the new tokens; returns attention's output [B, T, Hq, D].

        query [B, Hq, T, D], key and value [B, Hkv, T, D]: one row of packed prompts, or a token for
        each slot.
        """
        if module not in self.layers:
            shapes = [(*self.shape, x.shape[1], x.shape[3]) for x in (key, value)]
            self.layers[module] = key.new_zeros(shapes[0]), key.new_zeros(shapes[1])
        keys, values = self.layers[module]
        key, value = key.transpose(1, 2), value.transpose(1, 2)  # [B, T, Hkv, D]
        if self.prompts:
            slots = self.prompts.slots
            places = self.prompts.places
            keys[slots, places] = key[0]
            values[slots, places] = value[0]
            q = query[0].transpose(0, 1)
            bounds = self.prompts.cu_seqlens
            longest = self.prompts.max_seqlen
            out = packed_attention(q, key[0], value[0], bounds, longest, self.backend, scale)
            return out.unsqueeze(0)
        if self.flash:
            return flash_step(query, key, value, keys, values, self.lengths, scale)
        places = self.lengths.long()
        keys[self.all_slots, places] = key[:, 0]
        values[self.all_slots, places] = value[:, 0]
        return masked_step(query, keys, values, self.mask, scale)


class PackedPrompts:
    """One row of prompts, and the slots and places that their tokens go to."""

    def __init__(self, prompts: list[list[int]], slots: list[int], device) -> None:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        places = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        self.max_seqlen = int(lengths.max())
        self.ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        self.slots = torch.tensor(slots).repeat_interleave(lengths).to(device)  # [T]
        self.places = places.to(device)  # [T]
        self.cu_seqlens = bounds.to(device, torch.int32)
        self.last = (bounds[1:] - 1).to(device)  # of each prompt's last token


def flash_step(query, key, value, keys, values, lengths, scale) -> torch.Tensor:
    """flash-attn's kernel for one token a slot. It stores key and value, too."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        query.transpose(1, 2),
        keys,
        values,
        key,
        value,
        cache_seqlens=lengths,
        softmax_scale=scale,
        causal=True,
    )


def masked_step(query, keys, values, mask, scale) -> torch.Tensor:
    """torch's attention for one token a slot.

    The query heads that share a key head take the place of a sequence: no key is repeated.
    """
    num_slots, _, _, head_dim = query.shape
    tokens = mask.shape[-1]
    out = F.scaled_dot_product_attention(
        query.view(num_slots, keys.shape[2], -1, head_dim),
        keys[:, :tokens].transpose(1, 2),
        values[:, :tokens].transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    return out.reshape(num_slots, 1, query.shape[1], -1)


@functools.cache
def flash_step_works(dtype: torch.dtype, heads: tuple[int, int, int], device) -> bool:
    """Whether flash-attn's kernel is here, takes these heads, and gives what torch's gives.

    heads: the number of query heads, that of key and value heads, and their size.
    """
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    query_heads, key_heads, size = heads
    generator = torch.Generator(device).manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    query = random_tensor(3, query_heads, 1, size)
    slots = KVSlots(3, 128, "", False, device)
    slots.lengths += torch.tensor([0, 17, 100], dtype=torch.int32, device=device)
    slots.begin_step(100)
    key, value = (random_tensor(3, key_heads, 1, size) for _ in range(2))
    keys, values = (random_tensor(*slots.shape, key_heads, size) for _ in range(2))
    module = torch.nn.Module()
    slots.layers[module] = keys.clone(), values.clone()
    wanted = slots.attend(module, query, key, value, None)
    try:
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)
        out = flash_step(query, key, value, keys, values, slots.lengths, None)
    except FLASH_REFUSES:
        return False
    kept = all(map(torch.equal, (keys, values), slots.layers[module]))
    return kept and torch.allclose(out.float(), wanted.float(), atol=2e-2)


def _attend_for_transformers(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """Attention over slots with the signature that transformers calls.

    The model's call passes `kv_slots` through. Raises AttentionError for what is not computed here.
    """
    slots: KVSlots | None = kwargs.get("kv_slots")
    if slots is None or attention_mask is not None:
        raise AttentionError("attention over slots takes kv_slots, without a mask")
    window = kwargs.get("sliding_window") or slots.shape[1]
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise AttentionError(f"{type(module).__name__}: attention with soft caps or sinks")
    if window < slots.shape[1]:
        raise AttentionError(f"{type(module).__name__}: a sliding window shorter than the notes")
    return slots.attend(module, query, key, value, scaling), None


AttentionInterface.register(SLOT_ATTENTION, _attend_for_transformers)
