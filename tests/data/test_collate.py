"""The packed row."""

import numpy as np

from loop.data.batch_plan import PackingSpec
from loop.data.collate import collate, pad_to
from loop.data.tokenization import Example


def example(key: str, ids: list[int], supervised_from: int) -> Example:
    input_ids = np.array(ids, np.int32)
    labels = input_ids.copy()
    labels[:supervised_from] = -100
    return Example(key, input_ids, labels)


def test_a_row_keeps_documents_apart():
    batch = collate(
        [example("a", [5, 6, 7, 8], 2), example("b", [1, 2, 3], 0)], PackingSpec(16, 16)
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.max_seqlen == 16  # one bound for all rows: a recorded step has it once
    # Position t predicts t + 1 inside its document: 8 does not predict b's first token, which
    # nothing predicts.
    assert batch.target_positions.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [7, 8, 2, 3]


def test_a_rank_without_examples_has_a_row_without_targets():
    batch = collate([], PackingSpec(16, 16))
    assert batch.input_ids.shape == (1, 1) and batch.targets.tolist() == [-100]


def test_the_number_of_targets_is_the_collators():
    rng = np.random.default_rng(0)
    examples = [
        example(str(i), rng.integers(0, 9, n).tolist(), int(rng.integers(0, n)))
        for i, n in enumerate(rng.integers(1, 30, 50))
    ]
    for e in examples:
        assert e.num_targets == int((collate([e], PackingSpec(64, 64)).targets != -100).sum())


def test_a_rows_fill_is_documents_of_its_own_no_longer_than_an_example():
    row = collate([example("a", [5, 6, 7], 0)], PackingSpec(64, 24))
    filled = pad_to(row, 64, 8, 24)
    assert filled.cu_seqlens.tolist() == [0, 3, 27, 51, 64, 64, 64, 64, 64]
    expected = [*range(3), *range(24), *range(24), *range(13)]
    assert filled.position_ids[0].tolist() == expected
    assert filled.input_ids[0].tolist() == [5, 6, 7] + [0] * 61
    assert filled.targets.tolist() == row.targets.tolist()
