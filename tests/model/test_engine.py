"""How steps are packed, by what the engine and the ranks can do."""

from types import SimpleNamespace

import pytest
import torch

from loop.config.schema import Config
from loop.model import build, engine, replay


def ranks_of(world_size: int, rank: int = 0):
    return SimpleNamespace(
        world_size=world_size,
        rank=rank,
        device=torch.device("cpu"),
        all=lambda flag: flag,
        all_gather_json=lambda value: [value] * world_size,
    )


@pytest.fixture
def config() -> Config:
    return Config(base="x", data={"train": "x"}, max_seq_len=512)


@pytest.mark.parametrize(
    ("world_size", "graphs", "pair_cost"), [(1, False, 0.0), (2, False, 0.5), (2, True, 0.0)]
)
def test_attention_counts_where_ranks_wait_for_rows_of_their_own_sizes(
    monkeypatch, config, world_size, graphs, pair_cost
):
    monkeypatch.setattr(engine, "cache_module_parameters", lambda: None)
    monkeypatch.setattr(engine, "attention_pair_cost", lambda *args: 0.5)
    monkeypatch.setattr(engine, "replay_layers", lambda *args: (640, (640, 9), ""))
    execution = SimpleNamespace(
        replicated=False, max_tokens=1024, warnings=["w"], use_cuda_graphs=graphs, dropout=None
    )
    base = SimpleNamespace(max_position_embeddings=256)
    packing, warnings = engine.prepare_engine(
        SimpleNamespace(module=None), execution, config, base, None, None, ranks_of(world_size)
    )
    assert packing.pair_cost == pair_cost and packing.max_seq_len == 256  # the base's, not 512
    assert (packing.max_tokens, packing.padded_shape) == (
        (640, (640, 9)) if graphs else (1024, None)
    )
    assert warnings[0] == "w"


@pytest.mark.parametrize("problem", ["", "no memory"])
def test_ranks_split_alike_where_one_of_them_captured_nothing(monkeypatch, problem):
    monkeypatch.setattr(replay, "padded_shape_of", lambda *args: (640, 9))
    monkeypatch.setattr(replay, "decoder_layers", lambda model: [])
    monkeypatch.setattr(replay, "graph_layers", lambda *args: problem)
    reserved = []
    dropout = SimpleNamespace(reserve=reserved.append)
    tokens, shape, warning = replay.replay_layers(
        512, None, None, None, 1024, dropout, ranks_of(2, rank=1)
    )
    assert tokens == 640 and reserved == [640]
    assert shape == (None if problem else (640, 9))
    assert warning.endswith("not replayed: no memory (rank 1)") if problem else warning == ""


@pytest.mark.parametrize("unfused", [set(), {"RMSNorm"}])
def test_layers_are_fused_where_no_part_is_left(monkeypatch, config, unfused):
    monkeypatch.setattr(build, "decoder_layers", lambda model: [])
    monkeypatch.setattr(build, "choose_dequantized", lambda *args: True)
    monkeypatch.setattr(build, "install_fused_parts", lambda layers, dequantized: unfused)
    run, left = build.fuse_layers(config, None, build.RunShape(1, True), None, ranks_of(1))
    assert (run.fused, run.dequantized, left) == (not unfused, True, unfused)


@pytest.mark.parametrize(
    ("method", "experts", "said"), [("qlora", 24, True), ("qlora", 0, False), ("full", 24, False)]
)
def test_experts_without_lora_are_told_where_there_are_some(
    monkeypatch, config, method, experts, said
):
    monkeypatch.setattr(build, "count_expert_weights", lambda model: experts)
    config = config.model_copy(update={"method": method})
    _, line = build.other_warnings(config, None)
    assert line.startswith("experts     24 weights") if said else line == ""
