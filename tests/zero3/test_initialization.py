"""DeepSpeed's start without the texts of all weights, and everything as it was afterwards."""

import gc

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from loop.zero3.initialization import lean_initialization


def test_weights_are_not_written_out_while_an_engine_is_made():
    weight = torch.nn.Parameter(torch.full((2, 3), 7.0))
    before = repr(weight), repr(weight.data)
    registers = DeepSpeedEngine.register_compile_pass
    frozen = gc.get_freeze_count()
    with lean_initialization():
        assert (repr(weight), repr(weight.data)) == ("Parameter[2, 3]", "Tensor[2, 3]")
        assert gc.get_freeze_count() > 10_000
        assert DeepSpeedEngine.register_compile_pass is not registers  # it imports the compiler
    assert (repr(weight), repr(weight.data)) == before
    assert DeepSpeedEngine.register_compile_pass is registers
    assert gc.get_freeze_count() <= frozen


def test_a_failure_leaves_nothing_behind():
    before = repr(torch.ones(2))
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError), lean_initialization():
        raise KeyError
    assert repr(torch.ones(2)) == before
    assert gc.get_freeze_count() <= frozen
