"""Sizes, limits and dropout of bases, whatever their families call them."""

from types import SimpleNamespace

import pytest
import torch

from loop.model.structure import context_length, switch_off_dropout, with_usual_names


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 256}, 256),
        ({"rope_type": "yarn", "original_max_position_embeddings": 256, "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "original_max_position_embeddings": 256, "factor": 2.0}, 1000),
        ({"rope_type": "llama3", "original_max_position_embeddings": 256, "factor": 4.0}, 1000),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_longest_document_is_what_positions_are_right_for(rope, limit, nested):
    settings = {"full": rope, "sliding": {"rope_type": "default"}} if nested else rope
    config = SimpleNamespace(max_position_embeddings=1000, rope_parameters=settings)
    assert context_length(config) == limit
    assert context_length(SimpleNamespace(rope_parameters=settings)) is None


@pytest.mark.parametrize(
    ("own", "inner"), [({"ffn_dim": 96}, 96), ({"n_inner": 40}, 40), ({"n_inner": None}, 256)]
)
def test_a_family_that_names_no_inner_size_means_four_hidden_ones(own, inner):
    config = with_usual_names(SimpleNamespace(hidden_size=64, num_attention_heads=4, **own))
    assert (config.head_dim, config.intermediate_size) == (16, inner)


def test_no_kind_of_noise_of_a_base_stays():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    model[1].attention_dropout = 0.3
    model[1].router_jitter_noise = 0.1
    model[1].eps = 1e-5
    switch_off_dropout(model)
    layer = model[1]
    assert (model[0].p, layer.attention_dropout, layer.router_jitter_noise) == (0.0, 0.0, 0.0)
    assert layer.eps == 1e-5
