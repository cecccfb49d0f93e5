"""A base that is loaded straight into its shards is the one that is loaded whole, bit for bit."""

import json
import sys

import pytest
import torch
from helpers import run_ok
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loop.model.loading import load_base


def worker(bases: list[str]) -> None:
    """On each of two ranks: every parameter, gathered, and every quantisation state against the ordinary way's; then a rank can't read."""
    import deepspeed
    import loop.stream as stream

    from loop.config.schema import ConfigError
    from loop.distributed.world import init_distributed
    from loop.model.loading import resolve_base
    from loop.model.quantization import nf4_config

    ranks = init_distributed()

    def load(base, double_quant, dtype):
        ds = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        return stream.stream_base(
            resolve_base(base),
            dtype,
            "cpu",
            revision=None,
            attention="sdpa",
            ds=ds,
            quantization=nf4_config(dtype, double_quant),
        )

    def raw(x: torch.Tensor) -> torch.Tensor:
        return x.detach().contiguous().reshape(-1).view(torch.uint8)

    for base in bases:
        for double_quant, dtype in (
            (True, torch.bfloat16),
            *[(False, torch.float32)] * (base != bases[-1]),
        ):  # that one was quantised in bf16
            ours, whole = (
                load(base, double_quant, dtype),
                load_base(base, dtype, "cpu", double_quant=double_quant),
            )
            assert [n for n, _ in ours.named_parameters()] == [
                n for n, _ in whole.named_parameters()
            ]
            for (name, p), w in zip(ours.named_parameters(), whole.parameters()):
                assert (
                    p.numel() == 0
                    and p.ds_tensor.numel() * ranks.world_size < w.numel() + 2 * ranks.world_size
                ), name  # only its share
                with deepspeed.zero.GatheredParameters([p]):
                    same = (
                        type(p) is type(w),
                        p.dtype == w.dtype,
                        p.shape == w.shape and torch.equal(raw(p), raw(w)),
                    )
                    assert all(same), (name, same)
                states = [getattr(x, "quant_state", None) for x in (p, w)]
                assert (states[0] is None) == (states[1] is None), name
                if states[0]:
                    mine, theirs = (s.as_dict(packed=True) for s in states)
                    assert mine.keys() == theirs.keys() and all(
                        torch.equal(mine[k], theirs[k]) for k in mine
                    ), name
            assert all(
                torch.equal(a, b) for a, b in zip(ours.buffers(), whole.buffers(), strict=True)
            )
            assert (
                not any(x.is_meta for x in [*ours.parameters(), *ours.buffers()])
                and ours.is_loaded_in_4bit
            )

    if ranks.rank == 1:
        read = stream.Weights.__getitem__

        def torn(self, name):
            if "layers.1.mlp" in name:
                raise OSError("Input/output error")
            return read(self, name)

        stream.Weights.__getitem__ = torn
    with pytest.raises(ConfigError, match="layers.1.mlp.gate_proj.weight can't be read"):
        load(bases[0], True, torch.bfloat16)
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
    from loop.model.loading import resolve_base
    from loop.model.quantization import nf4_config
    from loop.model.streaming import stream_base

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (
        stream_base(
            resolve_base(str(tmp_path)),
            torch.float32,
            "cpu",
            revision=None,
            attention="sdpa",
            ds={},
            quantization=nf4_config(torch.float32),
        )
        is None
    )


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
