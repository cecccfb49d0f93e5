"""The memory estimate against figures by hand, tensors that are alive, and peaks seen on a GPU."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import run_ok, tinyllama_shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from loop.config.deepspeed import build_ds_config
from loop.config.schema import Config
from loop.memory.estimate import (
    LOADED,
    STATES,
    RunShape,
    count_weights,
    estimate_memory,
    peak_bytes,
)
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


def test_components_of_a_small_model_by_hand():
    """Two ranks, bf16, two rows of 100 tokens of which 30 have logits.

    Grouped queries, tied embeddings, no dropout.
    """
    model_config = AutoConfig.for_model(
        "llama", **SMALL | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    )
    config = seed_config(
        max_seq_len=100,
        lora={"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]},
    )
    run = RunShape(world_size=2, fused=True, supervised_fraction=0.15, dequantized=True)
    parts = estimate_memory(config, DS, model_config, run, 2, checkpointing=False)
    matrices = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 640)
    adapter = 2 * 4 * (256 + 256 + 640 + 256)
    blocks = matrices // 64
    codebooks = 14 * 4 * (256 + 1 + 16)  # two codes and an offset for each matrix
    assert parts["NF4 codes"] == matrices / 2 / 2
    assert parts["quantisation state"] == blocks + 4 * blocks / 256 + codebooks
    assert parts["16-bit weights"] == 2 * (1000 * 256 + 5 * 256) / 2
    assert parts["dequantised copies"] == 2 * matrices
    assert parts["adapter"] == 2 * adapter / 2
    assert parts["fp32 masters"] == 2 * adapter
    assert parts["Adam moments"] == 4 * adapter
    assert parts["gradients, fp32"] == 2 * adapter
    assert parts["gradient bucket"] == 400_000
    assert parts["dropout mask"] == 0
    of_a_token = 2 * (4 * 256 + 2 * 256 + 2 * 128 + 2 * 640 + 7 * 4) + 4 * 4 + 8
    assert parts["activations"] == 200 * (2 * of_a_token + 4 * 256)
    assert parts["logits"] == 30 * 1000 * (2 + 4 + 4 + 4)
    # Within the reuse distance: all of it.
    assert parts["gathered weights"] == matrices / 2 + 2 * (1000 * 256 + 5 * 256) + 2 * adapter
    small = estimate_memory(config, DS, model_config, run, 2, checkpointing=True)
    assert small["activations"] == 200 * (2 * 2 + 4) * 256
    assert small["activations"] + small["layer in work"] < parts["activations"]


@pytest.mark.parametrize(
    ("fused", "dequantized", "seen"),
    [(False, False, 35.3), (True, True, 21.2), (True, False, 19.4)],
)
def test_the_peaks_that_were_seen_on_an_h200(fused, dequantized, seen):
    """TinyLlama's shape, 16,384 tokens of the bench's examples (27 % supervised), one GPU.

    No checkpointing; GiB allocated at the peak.
    """
    config = seed_config()
    run = RunShape(1, fused, supervised_fraction=0.27, dequantized=dequantized)
    parts = estimate_memory(
        config, build_ds_config(config, for_gpus=True), tinyllama_shape(), run, 8, False
    )
    assert peak_bytes(parts) / 2**30 == pytest.approx(seen, rel=0.02)


def test_every_way_to_train_is_estimated():
    model_config, ds_config = tinyllama_shape(), build_ds_config(seed_config(), for_gpus=True)
    run = RunShape(world_size=1, fused=True)

    def estimate(method: str = "qlora", ds_config: dict = ds_config) -> dict[str, int]:
        return estimate_memory(seed_config(method=method), ds_config, model_config, run, 1, True)

    qlora, lora, full = estimate("qlora"), estimate("lora"), estimate("full")
    dense_bytes = lora["16-bit weights"] - qlora["16-bit weights"]
    assert qlora["NF4 codes"] + qlora["quantisation state"] < 0.26 * dense_bytes
    assert full["16-bit weights"] == 0
    assert full["fp32 masters"] == 4 * 1_100_048_384
    assert full["update"] > 0
    assert sum(count_weights(seed_config(), model_config).trained) == 6_307_840
    zero = ds_config["zero_optimization"] | {"offload_param": {"device": "cpu"}}
    offloaded = estimate(ds_config=ds_config | {"zero_optimization": zero})
    assert offloaded["NF4 codes"] == offloaded["16-bit weights"] == offloaded["adapter"] == 0
    assert offloaded["gathered weights"] > 0
    in_fp32 = {"zero_optimization": zero, "bf16": {"enabled": False}}
    masters = estimate(ds_config=ds_config | in_fp32)["fp32 masters"]
    assert masters == qlora["fp32 masters"]  # those on the GPU are not the weights on the CPU
    fp32 = estimate(ds_config=ds_config | {"bf16": {"enabled": False}})
    assert fp32["fp32 masters"] == 0
    assert fp32["adapter"] == 2 * qlora["adapter"]
    assert fp32["NF4 codes"] == qlora["NF4 codes"]


def test_few_logits_are_no_chunk_and_many_are():
    config = seed_config(max_seq_len=100, chunked_loss=True)
    model_config = AutoConfig.for_model("llama", **SMALL)
    run = RunShape(1, fused=True, supervised_fraction=0.3)
    few = estimate_memory(config, DS, model_config, run, 1, False)["logits"]
    assert few == 30 * 1000 * (2 + 12)
    model_config.vocab_size = 1_000_000
    many = estimate_memory(config, DS, model_config, run, 1, False)["logits"]
    assert many == 30_000_000 * 2 * 2 + 2**23 * 12


def test_what_zero3_prefetches_is_gathered_beside_what_it_reuses():
    config = seed_config(max_seq_len=100)
    model_config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": 10})
    gathered = []
    for prefetched in (0, 100_000):
        settings = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": prefetched}
        zero = DS["zero_optimization"] | settings
        # What is prefetched is numbers as they are stored: of NF4 codes four weights each.
        parts = estimate_memory(
            config,
            DS | {"zero_optimization": zero},
            model_config,
            RunShape(world_size=2, fused=True),
            1,
            False,
        )
        gathered.append(parts["gathered weights"])
    assert 0 < gathered[1] - gathered[0] <= 2 * 100_000


def test_cuda_graphs_are_for_layers_that_do_not_recompute():
    config, model_config = seed_config(), tinyllama_shape()
    ds_config = build_ds_config(config, for_gpus=True)
    run = RunShape(world_size=1, fused=True)
    graphs = replace(run, cuda_graphs=True)

    def estimate(run: RunShape, checkpointing: bool) -> dict[str, int]:
        return estimate_memory(config, ds_config, model_config, run, 1, checkpointing)

    assert estimate(run, True) == estimate(graphs, True)
    more = estimate(graphs, False)["activations"] - estimate(run, False)["activations"]
    assert more == 22 * 2048 * 2048 * 2  # the gradient of each layer's input, bf16


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, among those made under it.

    That is what a GPU's allocator would count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                self._count(t.untyped_storage())
        self.most = max(self.most, self.now)
        return made

    def _count(self, storage) -> None:
        if storage.nbytes() and id(storage) not in self.known:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def storage_bytes(tensors) -> int:
    """Bytes of the different storages."""
    storages = [t.untyped_storage() for t in tensors if t.numel()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def cached_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """The dequantised copies that the fused layers of a model hold."""
    from loop.kernels.fused_layers import LoraLinear

    modules = {id(m) for m in module.modules()}
    linears = [x for x in gc.get_objects() if type(x) is LoraLinear and id(x.module) in modules]
    return [x.cached_weight for x in linears if x.cached_weight is not None]


def live_components(engine, optimizer, masks) -> dict[str, int]:
    """Bytes of the tensors that are alive after a step, by component."""
    from loop.optim.adamw import trainable_parameters

    zero = engine.optimizer
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    quantized = [p for p in frozen if hasattr(p, "quant_state")]
    states = [s for p in quantized for s in (p.quant_state, p.quant_state.state2)]
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    return {
        "NF4 codes": storage_bytes(p.ds_tensor for p in quantized),
        "quantisation state": storage_bytes(t for s in states for t in (s.absmax, s.code)),
        "16-bit weights": storage_bytes(
            p.ds_tensor for p in frozen if not hasattr(p, "quant_state")
        ),
        "dequantised copies": storage_bytes(cached_weights(engine.module)),
        "adapter": storage_bytes(p.ds_tensor for _, p in trainable_parameters(engine.module)),
        "fp32 masters": storage_bytes(zero.fp32_partitioned_groups_flat),
        "Adam moments": storage_bytes(t for t in moments if torch.is_tensor(t) and t.numel() > 1),
        "gradients, fp32": storage_bytes([zero.grad_partitions_flat_buffer]),
        "gradient bucket": storage_bytes(b.buffer for b in zero.ipg_buckets.values()),
        "dropout mask": storage_bytes([masks.buffer]),
    }


class GatheredWeights:
    """The most bytes of gathered weights, looked at before and after layers run."""

    def __init__(self, engine) -> None:
        from loop.model.structure import decoder_layers

        self.parameters = list(engine.module.parameters())
        self.most = 0
        layers = decoder_layers(engine.module)
        for module in (*layers, engine.module.get_output_embeddings()):
            module.register_forward_hook(self.look)
            module.register_full_backward_pre_hook(self.look)

    def look(self, *_) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        there = [p for p in self.parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
        self.most = max(self.most, sum(p.numel() * p.element_size() for p in there))


def saved_activations(engine, batch, draw) -> int:
    """Bytes that a forward pass on one rank keeps for the backward pass, weights excluded."""
    from loop.model.loss import summed_cross_entropy

    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    # The weights are the shards themselves.
    assert all(p.data_ptr() == p.ds_tensor.data_ptr() for p in frozen)
    tensors = [*engine.module.parameters(), *cached_weights(engine.module)]
    weights = {t.untyped_storage().data_ptr() for t in tensors}
    saved = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        draw(0)
        logits = engine(**batch.model_inputs()).logits
        assert summed_cross_entropy(logits, batch.targets) > 0
    log_probabilities = TARGETS * logits.shape[-1] * 4  # which the loss keeps
    return sum(saved.values()) - log_probabilities


def make_engine(config: Config, ds_config: dict, run: RunShape, checkpointing: bool, ranks):
    """(engine, ZeRO-3's optimizer, LoRA's dropout masks)"""
    import deepspeed

    from loop.distributed.seeding import seed_everything
    from loop.kernels.dropout import install_dropout
    from loop.kernels.fuse import install_fused_parts
    from loop.model.activation_checkpointing import use_checkpointing
    from loop.model.loading import load_model
    from loop.model.structure import decoder_layers
    from loop.optim.adamw import build_optimizer
    from loop.zero3.replicated import replicate_weights

    seed_everything(0)
    model = load_model(config, ds_config, "cpu", "sdpa")
    masks = install_dropout(model, config.lora["lora_dropout"], 0, "cpu")
    assert not (run.fused and install_fused_parts(decoder_layers(model), run.dequantized))
    if checkpointing:
        use_checkpointing(model)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, config), config=ds_config
    )
    engine.train()
    if ranks.world_size == 1:
        replicate_weights(engine, ranks)
    return engine, optimizer, masks


def make_batch():
    """One example of TOKENS tokens, of which TARGETS are supervised."""
    import numpy as np

    from loop.data.batch_plan import PackingSpec
    from loop.data.collate import collate
    from loop.data.tokenization import Example

    ids = np.arange(TOKENS, dtype=np.int32) % 900 + 5
    example = Example("a", ids, np.where(ids < 5 + TARGETS, ids, -100))
    return collate([example], PackingSpec(TOKENS, TOKENS))


def measure_case(
    live: Live, base: str, ranks, fused, dequantized, checkpointing, reuse_distance=10**9
) -> list:
    """[fused, checkpointing, seen, parts, alive, resident, highest] of two steps.

    seen: live bytes by component; parts: the estimate; alive: all live bytes after a step, resident
    by the estimate; highest: live bytes at the fullest moment of the second step.
    """
    from loop.model.loading import load_model_config
    from loop.optim.adamw import trainable_parameters
    from loop.train import train_step

    model_config, ds_config = (
        load_model_config(base),
        build_ds_config(seed_config(), for_gpus=True) | DS,
    )
    ds_config["zero_optimization"]["stage3_max_reuse_distance"] = reuse_distance
    config = Config(base=base, data={"train": "x"}, max_seq_len=TOKENS, lora={"r": 16})
    run = RunShape(ranks.world_size, fused, TARGETS / TOKENS, dequantized)
    parts = estimate_memory(config, ds_config, model_config, run, 1, checkpointing)
    gc.collect()
    engine, optimizer, masks = make_engine(config, ds_config, run, checkpointing, ranks)
    batch = make_batch()
    gathered = GatheredWeights(engine)

    def draw(i: int) -> None:
        masks.draw(0, [0], batch.cu_seqlens)

    _, trained = zip(*trainable_parameters(engine.module))
    for _ in range(2):  # ZeRO-3 knows the order of the layers after the first
        live.most = 0
        train_step(engine, trained, [batch], TARGETS, 1.0, ranks, draw_dropout=draw)
    highest = live.most
    if ranks.world_size > 1:
        engine.empty_partition_cache()
    seen = live_components(engine, optimizer, masks)
    if reuse_distance > 1:
        # Else the fullest moment is between the hooks: the output layer is put into its shape.
        seen["gathered weights"] = gathered.most * (ranks.world_size > 1)
    gc.collect()
    alive = live.now
    resident = sum(parts[name] for name in (*LOADED, *STATES, "dropout mask"))
    if ranks.world_size == 1:
        seen["activations"] = saved_activations(engine, batch, draw)
    if fused and not checkpointing:
        # A CPU's RMSNorm goes through fp32, and attention a document at a time puts its output
        # together.
        width = model_config.num_hidden_layers * model_config.hidden_size
        parts["activations"] += TOKENS * width * (2 * 2 + 2)
    engine.destroy()
    return [fused, checkpointing, seen, parts, alive, resident, highest]


def worker(base: str) -> None:
    """On each rank, for each kind of layers: what `measure_case` returns, a line of JSON each."""
    from loop.distributed.world import init_distributed

    ranks = init_distributed()
    settings_of_cases: list[tuple] = [
        (False, False, False),
        (True, True, True),
        (True, False, True, 1),
    ]
    if ranks.world_size == 1:
        settings_of_cases.append((True, False, False))
    for settings in settings_of_cases:
        with Live() as live:
            print(json.dumps(measure_case(live, base, ranks, *settings)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_alive_is_what_was_estimated(world_size, tiny_base, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    output = run_ok(world_size, "tests/memory/test_estimate.py", str(tmp_path))
    cases = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(cases) == (4 if world_size == 1 else 3)
    for fused, checkpointing, seen, parts, alive, resident, highest in cases:
        peak = peak_bytes(parts)
        print({name: (size, parts[name]) for name, size in seen.items()})
        print(alive, resident, highest, peak)
        for name, size in seen.items():
            assert size == pytest.approx(parts[name], rel=0.1), (name, fused, checkpointing)
        assert alive == pytest.approx(resident, rel=0.1)  # nothing else is there
        assert highest == pytest.approx(peak, rel=0.1), (fused, checkpointing)


def test_a_cpu_run_says_how_far_its_rss_rose():
    """Roughly: meanwhile the system may take back pages of the libraries that nobody reads."""
    gc.collect()  # nor is what earlier tests left to be handed back in between
    memory = PeakMemory(torch.device("cpu"))
    first = torch.ones(128 * 2**20)  # 512 MiB that are gone when the steps begin
    del first
    memory.begin()
    second = torch.ones(64 * 2**20)  # 256 MiB
    line = memory.describe_beside(dict.fromkeys(LOADED, 2**30) | {"allocator slack": 7})
    assert "predicted 5.00 GiB at the peak" in line
    assert "RSS rose" in line
    assert len(second)
    assert 0.1 < float(line.split("measured ")[1].split(" GiB")[0]) < 0.4


if __name__ == "__main__":
    worker(sys.argv[1])
