"""A base that is loaded straight into its shards is the one that is loaded whole, bit for bit."""

import json
import shutil
import sys

import pytest
import torch
from helpers import run_ok
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loop.config.schema import ConfigError
from loop.kernels.quantization import QUANTIZATIONS
from loop.model.loading import load_base
from loop.model.streaming import check_finite


def load_streamed(base: str, dtype: torch.dtype, double_quant: bool = True):
    from loop.model.loading import resolve_base
    from loop.model.streaming import stream_base

    return stream_base(
        resolve_base(base),
        dtype,
        "cpu",
        revision=None,
        quantization_config=QUANTIZATIONS["nf4"].transformers_config(dtype, double_quant),
        attention="sdpa",
        ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == torch.bfloat16},
        },
    )


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def check_parameter(name: str, sharded, full, world_size: int) -> None:
    """A shard alone, the full tensor once gathered, and the quantisation state, bit for bit."""
    import deepspeed

    assert sharded.numel() == 0, name
    assert sharded.ds_tensor.numel() * world_size < full.numel() + 2 * world_size, name
    with deepspeed.zero.GatheredParameters([sharded]):
        assert type(sharded) is type(full), name
        assert sharded.dtype == full.dtype, name
        assert sharded.shape == full.shape and torch.equal(raw(sharded), raw(full)), name
    states = [getattr(x, "quant_state", None) for x in (sharded, full)]
    assert (states[0] is None) == (states[1] is None), name
    if states[0]:
        mine, theirs = (state.as_dict(packed=True) for state in states)
        assert mine.keys() == theirs.keys(), name
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def worker(bases: list[str]) -> None:
    """On each of two ranks: compares with the ordinary way; then a rank can't read."""
    import loop.model.streaming as streaming
    from loop.config.schema import ConfigError
    from loop.distributed.world import init_distributed

    ranks = init_distributed()
    for base in bases:
        kinds = [(True, torch.bfloat16), (False, torch.float32)]
        if base == bases[-1]:  # it was quantised in bf16
            kinds = kinds[:1]
        for double_quant, dtype in kinds:
            ours = load_streamed(base, dtype, double_quant)
            full = load_base(base, dtype, "cpu", double_quant=double_quant)
            names = [name for name, _ in ours.named_parameters()]
            assert names == [name for name, _ in full.named_parameters()]
            for name, p, w in zip(names, ours.parameters(), full.parameters(), strict=True):
                check_parameter(name, p, w, ranks.world_size)
            buffers = list(zip(ours.buffers(), full.buffers(), strict=True))
            assert all(torch.equal(a, b) for a, b in buffers)
            assert not any(x.is_meta for x in [*ours.parameters(), *ours.buffers()])
            assert ours.is_loaded_in_4bit

    if ranks.rank == 1:
        read = streaming.SafetensorsReader.__getitem__

        def torn(self, name):
            if "layers.1.mlp" in name:
                raise OSError("Input/output error")
            return read(self, name)

        streaming.SafetensorsReader.__getitem__ = torn
    with pytest.raises(ConfigError, match="layers.1.mlp.gate_proj.weight can't be read"):
        load_streamed(bases[0], torch.bfloat16)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_shards_hold_what_the_whole_model_holds(tiny_base, tmp_path):
    """In one file and in many, with tied embeddings, and quantised already."""
    tied = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied", max_shard_size="60KB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 2
    load_base(tiny_base, torch.bfloat16, "cpu").save_pretrained(tmp_path / "quantised")
    bases = [tiny_base, str(tmp_path / "tied"), str(tmp_path / "quantised")]
    run_ok(2, "tests/model/test_streaming.py", json.dumps(bases))


def test_a_base_with_other_names_is_left_to_the_ordinary_way(tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_streamed(str(tmp_path), torch.float32) is None


def test_tied_weights_that_are_stored_apart_are_left_to_the_ordinary_way(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_streamed(str(tmp_path), torch.float32) is None


def test_a_weight_of_another_shape_is_named(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = r"mlp.gate_proj.weight as \[96, 64\], and stored is \[128, 64\]"
    with pytest.raises(ConfigError, match=words):
        load_streamed(str(tmp_path), torch.float32)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value):
    check_finite("a.weight", torch.full((2, 2), 60000.0, dtype=torch.float16))  # its sum is inf
    with pytest.raises(ConfigError, match="b.weight holds NaN or infinite"):
        check_finite("b.weight", torch.tensor([1.0, value]))
