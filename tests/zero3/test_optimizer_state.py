"""The trained weights and their optimizer state, cut into files of a bounded size."""

from types import SimpleNamespace

import pytest
import torch

from loop.zero3 import optimizer_state


def weights(*sizes: int) -> list[tuple]:
    return [(f"w{i}", SimpleNamespace(ds_numel=size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ([1, 1, 1, 1], [["w0", "w1"], ["w2", "w3"]]),  # of 4 bytes, of three kinds
        ([9, 1, 1, 1], [["w0"], ["w1", "w2"], ["w3"]]),  # a weight may be larger than a file
        ([2, 1, 2], [["w0"], ["w1"], ["w2"]]),
    ],
)
def test_a_file_holds_all_kinds_of_its_weights_and_no_more_bytes_than_it_may(
    monkeypatch, sizes, files
):
    monkeypatch.setattr(optimizer_state, "FILE_BYTES", 2 * 3 * 4)
    groups = [list(group) for group in optimizer_state.file_groups(weights(*sizes), 3)]
    assert [[name for name, _ in group] for group in groups] == files


def test_the_files_of_a_checkpoint_are_cut_by_all_that_it_saves(monkeypatch):
    """AdamW saves a weight, and two moments of it."""
    monkeypatch.setattr(optimizer_state, "FILE_BYTES", 2 * 3 * 4)
    seen = []

    def cut(parameters, num_kinds):
        seen.append(num_kinds)
        return iter(())

    monkeypatch.setattr(optimizer_state, "file_groups", cut)
    model = torch.nn.Linear(2, 2)
    inner = torch.optim.AdamW(model.parameters())
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace(optimizer=inner))
    assert list(optimizer_state.gather_full_state(engine, ranks=None)) == []
    assert seen == [3]
