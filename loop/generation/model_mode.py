"""A model in the state in which it writes, and back."""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel


@contextlib.contextmanager
def generation_mode(model, attention: str | None = None) -> Iterator[torch.device]:
    """Puts a model into evaluation mode, with a KV cache, and restores it. Gives its device.

    Packed attention has no cache, so another one stands in: PyTorch's own, which takes the padding
    mask, or the one that is named. The base's generation_config is put aside: transformers would
    fill in from it whatever a call leaves open.
    """
    config = model.config
    was_training = model.training
    own_attention = config._attn_implementation
    text_config = config.get_text_config()  # of the language model
    use_cache = text_config.use_cache
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    generation_config = base.generation_config
    try:
        base.generation_config = GenerationConfig()
        model.eval()
        base.set_attn_implementation(attention or ("sdpa" if base._supports_sdpa else "eager"))
        text_config.use_cache = True
        yield base.device
    finally:
        base.generation_config = generation_config
        base.set_attn_implementation(own_attention)
        text_config.use_cache = use_cache
        model.train(was_training)
