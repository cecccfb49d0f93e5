"""A step of the loop beside an engine that is none: what it tells of its micro-batches."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loop import train
from loop.data.batch_plan import PackingSpec
from loop.data.collate import collate
from loop.data.tokenization import Example

RANKS = SimpleNamespace(device="cpu", world_size=1, all_reduce_sum=lambda values: values)


class Engine:
    """Gives every token the same chance; NaN for a micro-batch that begins with token 9."""

    def __call__(self, input_ids, logits_to_keep, **_):
        logits = torch.zeros(1, len(logits_to_keep), 10, requires_grad=True)
        return SimpleNamespace(logits=logits * (math.nan if input_ids[0, 0] == 9 else 1))

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss, scale_wrt_gas: bool) -> None: ...

    def step(self) -> None: ...


def test_a_step_names_the_micro_batches_whose_loss_is_no_number(monkeypatch):
    monkeypatch.setattr(train, "clip_grad_norm", lambda *_: torch.tensor(2.0))

    def step(*firsts: int) -> train.StepResult:
        ids = [np.array([first, 1, 2], np.int32) for first in firsts]
        batches = [collate([Example("a", i, i)], PackingSpec(16, 16)) for i in ids]
        return train.train_step(Engine(), [], batches, 2 * len(ids), 0.5, RANKS)

    assert step(3, 4) == (pytest.approx(math.log(10)), 2.0, [])
    bad = step(3, 9, 4, 9)
    assert math.isnan(bad.loss) and bad.nonfinite == [1, 3]
