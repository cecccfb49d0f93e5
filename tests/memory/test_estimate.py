"""The memory counted before a run is the memory of the run: against figures by hand, tensors that are alive, and peaks seen on a GPU."""

import gc
import json
import sys
import weakref

import pytest
import torch
from helpers import run_ok, tinyllama_shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from loop.config.deepspeed import build_ds_config
from loop.config.schema import Config
from loop.memory.estimate import LOADED, STATES, count_weights, estimate_memory, peak_bytes
from loop.memory.measure import PeakMemory

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TOKENS, TARGETS = 256, 64
DS = {
    "bf16": {"enabled": True},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 100_000,
        "stage3_param_persistence_threshold": 2000,
        "stage3_prefetch_bucket_size": 0,
    },
}


def seed_config(**changes) -> Config:
    return Config(base="x", data={"train": "x"}, **changes)


def test_components_of_a_small_shape_by_hand():
    """Two ranks, bf16, two rows of 100 tokens of which 30 have logits; grouped queries, tied embeddings, no dropout."""
    shape = AutoConfig.for_model(
        "llama", **SMALL | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    )
    config = seed_config(
        max_seq_len=100,
        lora={"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]},
    )
    parts = estimate_memory(shape, config, DS, 2, 2, False, True, True, 0.15)
    matrices = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 640)
    adapter = 2 * 4 * (256 + 256 + 640 + 256)
    blocks = matrices // 64
    assert parts["NF4 codes"] == matrices / 2 / 2
    assert parts["quantisation state"] == blocks + 4 * blocks / 256 + 14 * 4 * (
        256 + 1 + 16
    )  # two codes and an offset for each matrix
    assert parts["16-bit weights"] == 2 * (1000 * 256 + 5 * 256) / 2
    assert parts["dequantised copies"] == 2 * matrices
    assert parts["adapter"] == 2 * adapter / 2
    assert (parts["fp32 masters"], parts["Adam moments"], parts["gradients, fp32"]) == (
        2 * adapter,
        4 * adapter,
        2 * adapter,
    )
    assert parts["gradient bucket"] == 400_000 and parts["dropout mask"] == 0
    of_a_token = 2 * (4 * 256 + 2 * 256 + 2 * 128 + 2 * 640 + 7 * 4) + 4 * 4 + 8
    assert parts["activations"] == 200 * (2 * of_a_token + 4 * 256)
    assert parts["logits"] == 30 * 1000 * (2 + 4 + 4 + 4)
    assert (
        parts["gathered weights"] == matrices / 2 + 2 * (1000 * 256 + 5 * 256) + 2 * adapter
    )  # within the reuse distance: all of it
    small = estimate_memory(shape, config, DS, 2, 2, True, True, True, 0.15)
    assert (
        small["activations"] == 200 * (2 * 2 + 4) * 256
        and small["activations"] + small["layer in work"] < parts["activations"]
    )


def test_the_peaks_that_were_seen_on_an_h200():
    """TinyLlama's shape, 16,384 tokens of the bench's examples (27 % supervised), one GPU, no checkpointing; GiB allocated at the peak."""
    for fused, dequantized, seen in ((False, False, 35.3), (True, True, 21.2), (True, False, 19.4)):
        parts = estimate_memory(
            tinyllama_shape(),
            seed_config(),
            build_ds_config(seed_config()),
            1,
            8,
            False,
            fused,
            dequantized,
            0.27,
        )
        assert peak_bytes(parts) / 2**30 == pytest.approx(seen, rel=0.02)


def test_every_way_to_train_is_counted():
    shape, ds = tinyllama_shape(), build_ds_config(seed_config())
    qlora, lora, full = (
        estimate_memory(shape, seed_config(method=m), ds, 1, 1, True, True, False)
        for m in ("qlora", "lora", "full")
    )
    assert qlora["NF4 codes"] + qlora["quantisation state"] < 0.26 * (
        lora["16-bit weights"] - qlora["16-bit weights"]
    )
    assert (
        full["16-bit weights"] == 0
        and full["fp32 masters"] == 4 * 1_100_048_384
        and full["update"] > 0
    )
    assert (
        count_weights(shape, seed_config()).trained
        and sum(count_weights(shape, seed_config()).trained) == 6_307_840
    )
    cpu = ds | {"zero_optimization": ds["zero_optimization"] | {"offload_param": {"device": "cpu"}}}
    away = estimate_memory(shape, seed_config(), cpu, 1, 1, True, True, False)
    assert (
        away["NF4 codes"]
        == away["16-bit weights"]
        == away["adapter"]
        == 0
        < away["gathered weights"]
    )
    fp32 = estimate_memory(
        shape, seed_config(), ds | {"bf16": {"enabled": False}}, 1, 1, True, True, False
    )
    assert (
        fp32["fp32 masters"] == 0
        and fp32["adapter"] == 2 * qlora["adapter"]
        and fp32["NF4 codes"] == qlora["NF4 codes"]
    )


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, among those made under it: what a GPU's allocator would count."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for storage in (
            t.untyped_storage()
            for t in tree_leaves(made)
            if isinstance(t, torch.Tensor) and not t.is_meta
        ):
            if storage.nbytes() and id(storage) not in self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def worker(base: str) -> None:
    """On each rank, for each kind of layers: the bytes of the tensors that are alive after a step, by component, what a forward pass keeps, and
    the fullest moment of a step."""
    import deepspeed
    import numpy as np
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from loop.data.batch_plan import PackingSpec
    from loop.data.collate import collate
    from loop.data.tokenization import Example
    from loop.distributed.seeding import seed_everything
    from loop.distributed.world import init_distributed
    from loop.kernels.dropout import install_dropout
    from loop.kernels.fuse import fuse
    from loop.model.activation_checkpointing import use_checkpointing
    from loop.model.loading import load_model, load_model_config
    from loop.model.loss import summed_cross_entropy
    from loop.model.structure import decoder_layers
    from loop.optim.adamw import build_optimizer, trainable_parameters
    from loop.train import train_step
    from loop.zero3.replicated import replicate_weights

    ranks, shape, ds = (
        init_distributed(),
        load_model_config(base),
        build_ds_config(seed_config()) | DS,
    )

    def size(tensors) -> int:
        """Bytes of the different storages."""
        return sum(
            {
                s.data_ptr(): s.nbytes()
                for t in tensors
                if t.numel()
                for s in [t.untyped_storage()]
            }.values()
        )

    def case(
        fused: bool, dequantized: bool, checkpointing: bool, reuse_distance: int = 10**9
    ) -> list:
        ds["zero_optimization"]["stage3_max_reuse_distance"] = reuse_distance
        config = Config(base=base, data={"train": "x"}, max_seq_len=TOKENS, lora={"r": 16})
        parts = estimate_memory(
            shape,
            config,
            ds,
            ranks.world_size,
            1,
            checkpointing,
            fused,
            dequantized,
            TARGETS / TOKENS,
        )
        gc.collect()
        seed_everything(0)
        model = load_model(config, ds, "cpu", "sdpa")
        masks = install_dropout(model, config.lora["lora_dropout"], 0, "cpu")
        assert not (fused and fuse(decoder_layers(model), dequantized))
        if checkpointing:
            use_checkpointing(model)
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, config), config=ds
        )
        engine.train()
        if ranks.world_size == 1:
            replicate_weights(engine, ranks)
        ids = np.arange(TOKENS, dtype=np.int32) % 900 + 5
        example = Example("a", ids, np.where(ids < 5 + TARGETS, ids, -100))
        batch = collate([example], PackingSpec(TOKENS, TOKENS))
        gathered = [0]

        def most(*_):
            there = [
                p for p in engine.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE
            ]
            gathered[0] = max(gathered[0], sum(p.numel() * p.element_size() for p in there))

        for module in (*decoder_layers(engine.module), engine.module.get_output_embeddings()):
            module.register_forward_hook(most)
            module.register_full_backward_pre_hook(most)

        def draw(i: int) -> None:
            masks.draw(0, [0], batch.cu_seqlens)

        for _ in range(2):  # ZeRO-3 knows the order of the layers after the first
            live.most = 0
            train_step(
                engine,
                [p for _, p in trainable_parameters(engine.module)],
                [batch],
                TARGETS,
                1.0,
                ranks,
                draw,
            )
        highest = live.most
        engine.empty_partition_cache() if ranks.world_size > 1 else None
        frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        four_bit = [p for p in frozen if hasattr(p, "quant_state")]
        states = [
            t
            for p in four_bit
            for s in (p.quant_state, p.quant_state.state2)
            for t in (s.absmax, s.code)
        ]
        dense = [
            f.cell_contents
            for m in engine.module.modules()
            for f in getattr(getattr(m, "forward", None), "__closure__", None) or ()
        ]
        dense = [
            x.dense
            for cell in dense
            if isinstance(cell, list)
            for x in cell
            if getattr(x, "dense", None) is not None
        ]
        zero = engine.optimizer
        seen = {
            "NF4 codes": size(p.ds_tensor for p in four_bit),
            "quantisation state": size(states),
            "16-bit weights": size(p.ds_tensor for p in frozen if not hasattr(p, "quant_state")),
            "dequantised copies": size(dense),
            "adapter": size(p.ds_tensor for _, p in trainable_parameters(engine.module)),
            "fp32 masters": size(zero.fp32_partitioned_groups_flat),
            "Adam moments": size(
                t
                for s in optimizer.optimizer.state.values()
                for t in s.values()
                if torch.is_tensor(t) and t.numel() > 1
            ),
            "gradients, fp32": size([zero.grad_partitions_flat_buffer]),
            "gradient bucket": size(b.buffer for b in zero.ipg_buckets.values()),
            "dropout mask": size([masks.place]),
        }
        if (
            reuse_distance > 1
        ):  # else the fullest moment is between the hooks, when the output layer is put into its shape
            seen["gathered weights"] = gathered[0] * (ranks.world_size > 1)
        gc.collect()
        alive = live.now
        held = sum(parts[name] for name in (*LOADED, *STATES, "dropout mask"))
        if ranks.world_size == 1:  # weights are taken up as the shard itself
            assert all(p.data_ptr() == p.ds_tensor.data_ptr() for p in frozen)
            weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()} | {
                t.untyped_storage().data_ptr() for t in dense
            }
            kept = {}

            def keep(t):
                if t.untyped_storage().data_ptr() not in weights:
                    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                draw(0)
                assert (
                    summed_cross_entropy(engine(**batch.model_inputs()).logits, batch.targets) > 0
                )
            seen["activations"] = (
                sum(kept.values()) - TARGETS * shape.vocab_size * 4
            )  # the loss keeps logarithms of probabilities
        if (
            fused and not checkpointing
        ):  # a CPU's RMSNorm goes through fp32, and attention a document at a time puts its output together
            parts["activations"] += (
                TOKENS * shape.num_hidden_layers * (2 * 2 + 2) * shape.hidden_size
            )
        engine.destroy()
        return [fused, checkpointing, seen, parts, alive, held, highest]

    for settings in (
        (False, False, False),
        (True, False, False),
        (True, True, True),
        (True, False, True, 1),
    ):
        with Live() as live:
            print(json.dumps(case(*settings)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_alive_is_what_was_counted(world_size, tiny_base, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    cases = [
        json.loads(line)
        for line in run_ok(world_size, "tests/memory/test_estimate.py", str(tmp_path)).splitlines()
        if line.startswith("[")
    ]
    assert len(cases) == 4
    for fused, checkpointing, seen, parts, alive, held, highest in cases:
        print(
            {name: (size, parts[name]) for name, size in seen.items()},
            alive,
            held,
            highest,
            peak_bytes(parts),
        )
        for name, size in seen.items():
            assert size == pytest.approx(parts[name], rel=0.1), (name, fused, checkpointing)
        assert alive == pytest.approx(held, rel=0.1)  # nothing else is there
        assert highest == pytest.approx(peak_bytes(parts), rel=0.1), (fused, checkpointing)


def test_a_cpu_run_says_how_far_its_rss_rose():
    measured = PeakMemory(torch.device("cpu"))
    first = torch.ones(32 * 2**20)  # 128 MiB that are gone when the steps begin
    del first
    measured.begin()
    held = torch.ones(16 * 2**20)  # 64 MiB
    line = measured.beside(dict.fromkeys(LOADED, 2**30) | {"allocator slack": 7})
    assert "predicted 5.00 GiB at the peak" in line and "RSS rose" in line
    assert len(held) and 0.05 < float(line.split("measured ")[1].split(" GiB")[0]) < 0.12


if __name__ == "__main__":
    worker(sys.argv[1])
