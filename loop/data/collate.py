"""Micro-batches: several whole examples end to end in one row, with the bounds between them and the places of what is supervised."""

import dataclasses
from typing import Any

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: whole examples end to end in one row of T tokens."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64, from 0 in every document
    cu_seqlens: torch.Tensor  # [documents + 1] int32, where documents begin and end
    max_seqlen: int  # an upper bound of the documents' lengths
    target_positions: (
        torch.Tensor
    )  # [N] int64: the places of the row whose next token is supervised
    targets: torch.Tensor  # [N] int64: those next tokens

    def to(self, device) -> "PackedBatch":
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
            for k, v in vars(self).items()
        }
        return PackedBatch(**moved)

    def model_inputs(self) -> dict:
        """What the model takes. Logits are computed where there is a target and nowhere else: a dialogue is three quarters of
        the row, and its [T, vocabulary] logits would be the largest tensor of the step."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "logits_to_keep": self.target_positions,
            "use_cache": False,
        }


def collate(examples: list, max_seq_len: int, room: tuple[int, int] | None = None) -> PackedBatch:
    """Packs examples (each with `input_ids` and `labels`, int [L], -100 where not supervised) into one row, filled up to `room` = (tokens,
    documents) if given.

    Without examples it gives a row of one unsupervised token: a rank without work still takes part in every collective."""
    ids = [e.input_ids for e in examples] or [np.zeros(1, np.int64)]
    labels = [e.labels for e in examples] or [np.full(1, -100)]
    # Token t predicts token t + 1 of its own document: shift inside each document, so none predicts its neighbour's first token.
    following = np.concatenate([np.append(label[1:], -100) for label in labels])
    positions = np.flatnonzero(following != -100)
    # An empty index would give empty logits and no gradient at all; one dummy target, ignored by the loss, keeps the graph whole.
    keep = positions if len(positions) else np.zeros(1, np.int64)
    batch = PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(i)) for i in ids]))[None],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, ids)]).astype(np.int32)),
        max_seqlen=max_seq_len,
        target_positions=torch.from_numpy(keep),
        targets=torch.from_numpy(following[keep].astype(np.int64)),
    )
    return pad_to(batch, *room, max_seq_len) if room else batch


def pad_to(batch: PackedBatch, tokens: int, documents: int, max_seq_len: int) -> PackedBatch:
    """The batch as a row of exactly so many tokens and documents, for kernels that were recorded for that size. The fill has documents of its
    own, without targets; what is still lacking in documents is empty ones at the end. A batch that is larger stays as it is."""
    start, count = batch.input_ids.shape[1], len(batch.cu_seqlens) - 1
    ends = [*range(start + max_seq_len, tokens, max_seq_len), tokens] if start < tokens else []
    empty = documents - count - len(ends)
    if tokens < start or empty < 0:
        return batch
    fill = (torch.arange(tokens - start) % max_seq_len)[None]
    bounds = torch.tensor(ends + [tokens] * empty, dtype=torch.int32)
    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.zeros_like(fill)], 1),
        position_ids=torch.cat([batch.position_ids, fill], 1),
        cu_seqlens=torch.cat([batch.cu_seqlens, bounds]),
    )
