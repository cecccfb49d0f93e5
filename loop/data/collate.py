"""Micro-batches: several complete examples end to end in one row.

The bounds between the documents and the positions of the supervised tokens travel with the row. The
names are those of variable-length attention (cu_seqlens, max_seqlen).
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from .batch_plan import PackingSpec
from .tokenization import IGNORE, Example


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: complete examples end to end in one row of T tokens."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64, from 0 in every document
    cu_seqlens: torch.Tensor  # [documents + 1] int32, where documents begin and end
    max_seqlen: int  # an upper bound of the documents' lengths
    target_positions: torch.Tensor  # [N] int64: positions whose next token is supervised
    targets: torch.Tensor  # [N] int64: those next tokens

    def to(self, device) -> "PackedBatch":
        """The batch with its tensors on `device`; the copy does not wait for the GPU."""
        fields: dict[str, Any] = {}
        on_gpu = torch.device(device).type == "cuda"
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                if on_gpu and not value.is_cuda:
                    value = value.pin_memory()  # any other memory is copied when all before is done
                value = value.to(device, non_blocking=True)
            fields[name] = value
        return PackedBatch(**fields)

    def model_inputs(self) -> dict:
        """The keyword arguments of the model's forward pass.

        Logits are computed only at the target positions: a dialogue is three quarters of the row,
        and its [T, vocabulary] logits would be the largest tensor of the step.
        """
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "logits_to_keep": self.target_positions,
            "use_cache": False,
        }


def collate(examples: list[Example], packing: PackingSpec) -> PackedBatch:
    """Packs examples into one row, filled up to `packing.padded_shape` if that is set.

    Without examples the row is one unsupervised token: a rank without work still takes part in
    every collective.
    """
    ids = [example.input_ids for example in examples] or [np.zeros(1, np.int64)]
    labels = [example.labels for example in examples] or [np.full(1, IGNORE)]
    # Token t predicts token t + 1 of its own document: shift inside each document, so that none
    # predicts its neighbour's first token.
    next_labels = np.concatenate([np.append(label[1:], IGNORE) for label in labels])
    positions = np.flatnonzero(next_labels != IGNORE)
    if len(positions) == 0:
        # An empty index would give empty logits and no gradient at all. One dummy target, which the
        # loss ignores, keeps the graph connected.
        positions = np.zeros(1, np.int64)
    batch = PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(i)) for i in ids]))[None],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, ids)]).astype(np.int32)),
        max_seqlen=packing.max_seq_len,
        target_positions=torch.from_numpy(positions),
        targets=torch.from_numpy(next_labels[positions].astype(np.int64)),
    )
    if packing.padded_shape is None:
        return batch
    tokens, documents = packing.padded_shape
    return pad_to(batch, tokens, documents, packing.max_seq_len)


def pad_to(batch: PackedBatch, tokens: int, documents: int, max_seq_len: int) -> PackedBatch:
    """The batch as a row of exactly `tokens` tokens and `documents` documents.

    CUDA graphs are captured for one such size. The added tokens form documents of at most
    `max_seq_len`, without targets. Documents that are then still missing are empty ones at the end.
    A batch that exceeds the size is returned as it is.
    """
    start = batch.input_ids.shape[1]
    ends: list[int] = []  # of the added documents
    if start < tokens:
        ends = [*range(start + max_seq_len, tokens, max_seq_len), tokens]
    num_empty = documents - (len(batch.cu_seqlens) - 1) - len(ends)
    if tokens < start or num_empty < 0:
        return batch
    positions = (torch.arange(tokens - start) % max_seq_len)[None]
    bounds = torch.tensor(ends + [tokens] * num_empty, dtype=torch.int32)
    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.zeros_like(positions)], 1),
        position_ids=torch.cat([batch.position_ids, positions], 1),
        cu_seqlens=torch.cat([batch.cu_seqlens, bounds]),
    )
