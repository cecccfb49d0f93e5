"""A frozen embedding in the CPU's memory: only the rows of a micro-batch's tokens go to the GPU.

Llama-3-8B's embedding takes 1 GiB in 16 bits, of which a step reads some thousand rows of 8 KiB.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..config.schema import Config, ConfigError


class HostEmbedding(nn.Module):
    """The same rows as the nn.Embedding that it replaces.

    The weight is neither a parameter nor a buffer, so nothing moves, partitions or saves it.
    """

    def __init__(self, embedding: nn.Embedding, device: torch.device) -> None:
        super().__init__()
        weight = embedding.weight.detach().cpu()
        self.host_weight = weight.pin_memory() if device.type == "cuda" else weight
        self.device = device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [...]; returns [..., hidden] on the device."""
        return F.embedding(ids.cpu(), self.host_weight).to(self.device, non_blocking=True)


def keep_embedding_on_cpu(model: PreTrainedModel, config: Config, device: torch.device) -> None:
    """Replaces the model's input embedding by a `HostEmbedding`.

    Raises ConfigError where it is trained, is the output layer as well, or is to be partitioned.
    """
    reason = None
    if config.method == "full":
        reason = "method=full trains the embedding"
    elif dist.is_initialized() and dist.get_world_size() > 1:
        reason = "it is for one rank; ZeRO-3 partitions the embedding over several"
    elif model.config.get_text_config().tie_word_embeddings:
        reason = "the base's embedding is its output layer as well, which the GPU needs"
    if reason:
        raise ConfigError(f"embedding_on_cpu=true: {reason}; set it to false")
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), torch.device(device)))
