"""Decoder layers as CUDA graphs.

Graphs themselves need a GPU (test_gpu.py compares complete runs). Here a stand-in runs the layer
again at each replay, with the same static inputs and outputs.
"""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_fused_layers import with_lora
from transformers import LlamaConfig, LlamaForCausalLM

from loop.data.batch_plan import PackingSpec, plan_batches, split_step
from loop.data.collate import collate, pad_to
from loop.data.tokenization import Example
from loop.kernels.attention import ATTENTION_BACKENDS
from loop.kernels.attention_backends import available_backends
from loop.kernels.cuda_graphs import GraphedLayer, graph_layers, release_graphs
from loop.kernels.fuse import install_fused_parts
from loop.model import replay
from loop.model.loss import summed_cross_entropy
from loop.model.replay import can_replay, padded_shape_of
from loop.model.structure import decoder_layers

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Again:
    """A graph that computes instead of replaying: `work` writes into the static outputs."""

    def replay(self):
        self.work()


@pytest.fixture()
def stand_in(monkeypatch):
    forward, backward = GraphedLayer.capture_forward, GraphedLayer.capture_backward

    def capture_forward(self, x, pool):
        y = forward(self, x, pool)

        def work():
            with torch.no_grad():
                self.y.data.copy_(self.run_eagerly(self.x))
                # It was recorded before dy was allocated, so it may use the same memory.
                self.dy.fill_(torch.nan)

        self.forward_graph.work = work
        return y

    def capture_backward(self, dy, pool):
        dx = backward(self, dy, pool)

        def work():
            with torch.enable_grad():
                y = self.run_eagerly(self.x)
            gradients = torch.autograd.grad(y, [self.x, *self.trained], self.dy)
            for static, gradient in zip(self.gradients, gradients):
                static.copy_(gradient)

        self.backward_graph.work = work
        return dx

    monkeypatch.setattr(GraphedLayer, "capture_forward", capture_forward)
    monkeypatch.setattr(GraphedLayer, "capture_backward", capture_backward)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Again)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)


PACKING = PackingSpec(64, 24)


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(int(sum(lengths)))
    ids = [torch.randint(1, 64, (int(n),), generator=generator).numpy() for n in lengths]
    return [Example(str(i), x, x, 1.0) for i, x in enumerate(ids)]


def model_with_masks():
    torch.manual_seed(0)
    attention = ATTENTION_BACKENDS["sdpa"].transformers_name
    return with_lora(LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=attention)))


def step(model, masks, batch) -> dict[str, torch.Tensor]:
    masks.draw(1, list(range(len(batch.cu_seqlens) - 1)), batch.cu_seqlens.cpu())
    model.zero_grad()
    loss = summed_cross_entropy(model(**batch.model_inputs()).logits, batch.targets)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | gradients


def close(ours: dict, theirs: dict) -> bool:
    return all(torch.allclose(ours[n], theirs[n], rtol=1e-4, atol=1e-6) for n in theirs)


def test_a_padded_row_replayed_computes_what_the_row_computes(stand_in):
    """Rows of several sizes, one after the other: loss and every gradient, with dropout."""
    model, masks = model_with_masks()
    plain = copy.deepcopy(model)
    plain_masks = next(m.masks for m in plain.modules() if hasattr(m, "masks"))
    masks.reserve(64)
    replays = []
    assert graph_layers(model, decoder_layers(model), (64, 8), 24, "cpu") is None
    for layer in decoder_layers(model):
        work = layer.forward.backward_graph.work
        layer.forward.backward_graph.work = lambda work=work: (replays.append(1), work())
    for lengths in ((20, 24), (24, 24, 16), (3,), (20, 24)):
        row = collate(examples(*lengths), PACKING)
        ours, theirs = step(model, masks, pad_to(row, 64, 8, 24)), step(plain, plain_masks, row)
        assert close(ours, theirs)
    assert len(replays) == 4 * 3
    longer = collate(examples(24, 24, 20), PACKING)  # another size runs as it did
    ours, theirs = step(model, masks, longer), step(plain, plain_masks, longer)
    assert close(ours, theirs) and len(replays) == 4 * 3
    release_graphs(decoder_layers(model))
    assert not any(isinstance(layer.forward, GraphedLayer) for layer in decoder_layers(model))
    row = collate(examples(20, 24), PACKING)
    ours, theirs = step(model, masks, pad_to(row, 64, 8, 24)), step(plain, plain_masks, row)
    assert close(ours, theirs) and len(replays) == 4 * 3
    with torch.no_grad():
        logits = [m.eval()(**row.model_inputs()).logits for m in (model, plain)]
    assert torch.equal(*logits)


def test_a_weight_that_moved_is_not_read_at_its_old_place(stand_in):
    model, masks = model_with_masks()
    masks.reserve(64)
    graph_layers(model, decoder_layers(model), (64, 8), 24, "cpu")
    row = pad_to(collate(examples(20, 24), PACKING), 64, 8, 24)
    before = step(model, masks, row)
    for layer in decoder_layers(model):
        layer.forward.forward_graph.work = None  # a replay would fail now
    with pytest.raises(TypeError):
        step(model, masks, row)
    for p in model.parameters():
        p.data = p.data.clone()
    after = step(model, masks, row)
    assert all(torch.allclose(value, before[name]) for name, value in after.items())


def test_a_replay_is_for_training_on_a_row_of_its_size(stand_in):
    model, masks = model_with_masks()
    masks.reserve(64)
    graph_layers(model, decoder_layers(model), (64, 8), 24, "cpu")
    layers = [layer.forward for layer in decoder_layers(model)]

    def can_replay(tokens: int = 64) -> bool:
        found = {graphed.can_replay(torch.zeros(1, tokens, 32)) for graphed in layers}
        assert len(found) == 1
        return found.pop()

    assert can_replay()
    assert not can_replay(63) and not can_replay(128)
    with torch.no_grad():
        assert not can_replay()  # a forward pass without a backward one
    model.eval()
    assert not can_replay()
    model.train()
    assert can_replay()


@pytest.mark.parametrize("missing", [None, "cuda_graphs", "replicated", "gpu", "varlen"])
def test_layers_become_graphs_on_gpus_that_hold_all_weights(missing):
    config = SimpleNamespace(cuda_graphs=missing != "cuda_graphs")
    device = torch.device("cpu" if missing == "gpu" else "cuda")
    ranks = SimpleNamespace(device=device, all=bool)
    backend = "sdpa" if missing == "varlen" else "varlen"
    found = can_replay(config, missing != "replicated", ranks, backend)
    assert found == (missing is None)


def test_layers_with_arguments_of_their_own_are_left_alone(stand_in):
    model, masks = model_with_masks()
    masks.reserve(64)
    last = decoder_layers(model)[2]
    call = type(last).__call__

    class Other(type(last)):
        def __call__(self, x, **kwargs):
            return call(self, x, **kwargs | {"max_seqlen": 12})

    last.__class__ = Other
    problem = graph_layers(model, decoder_layers(model), (64, 8), 24, "cpu")
    assert problem == "layers get different arguments"
    assert not any(isinstance(layer.forward, GraphedLayer) for layer in decoder_layers(model))


def test_a_replay_that_computes_something_else_is_not_taken(stand_in, monkeypatch):
    """Wrong by 2 % in one weight's gradient, NaN in the last layer's, and captures that fail.

    The run's generator stays as it is.
    """
    backward = GraphedLayer.capture_backward

    def wrong(self, dy, pool):
        dx = backward(self, dy, pool)
        work = self.backward_graph.work
        self.backward_graph.work = lambda: (work(), self.gradients[-1].mul_(1.02))
        return dx

    def lost(self, dy, pool):
        dx = backward(self, dy, pool)
        work, last = self.backward_graph.work, self.layer.self_attn.layer_idx == 2
        self.backward_graph.work = lambda: (work(), last and self.gradients[-1].fill_(float("nan")))
        return dx

    def fails(self, dy, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def refuses(*args):  # without a word, as some kernels do
        raise AssertionError

    expected = {
        wrong: "a replay is 2.0e-02 from the layer itself",
        lost: "a replay is nan from the layer itself",
        fails: "operation not permitted when stream is capturing",
        refuses: "AssertionError",
    }
    for capture, problem in expected.items():
        monkeypatch.setattr(GraphedLayer, "capture_backward", capture)
        model, masks = model_with_masks()
        masks.reserve(64)
        state = torch.get_rng_state()
        assert graph_layers(model, decoder_layers(model), (64, 8), 24, "cpu") == problem
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(isinstance(layer.forward, GraphedLayer) for layer in decoder_layers(model))


def test_a_row_has_room_for_every_micro_batch_of_the_plan():
    lengths = torch.randint(2, 25, (200,), generator=torch.Generator().manual_seed(0)).numpy()
    plan = plan_batches(lengths, 64, 0)
    tokens, documents = padded_shape_of(plan, lengths, 1, 64, 24)
    for ids in (plan[s] for s in range(len(plan))):
        row = pad_to(collate(examples(*lengths[ids]), PACKING), tokens, documents, 24)
        bounds = row.cu_seqlens
        positions = row.position_ids[0]
        assert len(bounds) == documents + 1
        assert bounds[-1] == tokens == row.input_ids.shape[1] == len(positions)
        assert (bounds.diff() >= 0).all() and bounds.diff().max() <= 24
        starts = bounds[:-1][bounds.diff() > 0]
        assert (positions[starts] == 0).all() and (positions == 0).sum() == len(starts)
    for larger in (collate(examples(24, 24, 20), PACKING), collate(examples(*[2] * 9), PACKING)):
        assert pad_to(larger, 64, 8, 24) is larger


def test_the_room_on_several_ranks_is_that_of_the_real_cuts():
    lengths = np.clip(np.random.default_rng(0).normal(1463, 350, 400), 64, 2048).astype(int)
    plan = plan_batches(lengths, 16 * 2048, 0)
    tokens, documents = padded_shape_of(plan, lengths, 2, 9 * 2048, 2048)
    parts = [
        part
        for step in range(len(plan))
        for rank in split_step(plan[step], lengths, 2, PackingSpec(tokens, 2048))
        for part in rank
    ]
    # One micro-batch a rank and step, as with the larger capacity.
    assert len(parts) == 2 * len(plan) and tokens < 8.5 * 2048
    assert max(lengths[part].sum() for part in parts) <= tokens and max(map(len, parts)) < documents


def test_the_room_holds_the_longest_example_of_all():
    """Behind what is looked at, too: on many ranks a micro-batch may be shorter than it."""
    lengths = np.array([100] * 120_000 + [1000])
    plan = plan_batches(lengths, 4000, 0)
    last = np.flatnonzero(plan.order == 120_000)[0]
    # as the plan's last example
    plan = dataclasses.replace(plan, order=np.roll(plan.order, -last - 1))
    assert padded_shape_of(plan, lengths, 32, 2048, 2048)[0] >= 1000


def test_steps_that_were_not_looked_at_may_hold_twice_the_documents(monkeypatch):
    lengths = np.full(400, 20)
    plan = plan_batches(lengths, 200, 0)  # ten documents a step
    whole, padding = padded_shape_of(plan, lengths, 1, 200, 24)[1], 9  # of 200 tokens by 24
    assert whole == 10 + padding
    monkeypatch.setattr(replay, "MAX_EXAMPLES", 40)
    assert padded_shape_of(plan, lengths, 1, 200, 24)[1] == 2 * 10 + padding


@pytest.fixture(scope="module")
def on_gpu():
    """Makes the same model on a GPU, fused, in bf16, whose attention takes bounds as a tensor."""
    versions = available_backends("cuda")
    backend = next(b for b in ("flash_attn", "varlen") if not versions[b].startswith("missing"))
    shape = SHAPE | {"hidden_size": 128, "intermediate_size": 256}
    attention = ATTENTION_BACKENDS[backend].transformers_name

    def make():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=attention))
        model, masks = with_lora(base, torch.bfloat16, device="cuda")
        install_fused_parts(decoder_layers(model), False)
        return model, masks

    return make


def gpu_step(model, masks, batch) -> dict[str, torch.Tensor]:
    return step(model, masks, batch.to("cuda"))


def relative_errors(ours: dict, theirs: dict) -> dict[str, float]:
    errors = {}
    for name, wanted in theirs.items():
        gap = (ours[name].float() - wanted.float()).norm()
        errors[name] = (gap / wanted.float().norm().clamp_min(1e-6)).item()
    return errors


@pytest.mark.gpu
def test_real_graphs_replay_rows_with_hundreds_of_empty_documents(on_gpu):
    """Against the same layers launched kernel by kernel on the row without its padding.

    They differ by bf16 and by other sums in attention's backward pass.
    """
    (model, masks), (plain, plain_masks) = on_gpu(), on_gpu()
    masks.reserve(1024)
    assert graph_layers(model, decoder_layers(model), (1024, 400), 256, "cuda") is None
    for lengths in ((250, 200), (3,), tuple(range(2, 40)), (256, 256, 256, 256)):
        row = collate(examples(*lengths), PackingSpec(1024, 256))
        ours = gpu_step(model, masks, pad_to(row, 1024, 400, 256))
        errors = relative_errors(ours, gpu_step(plain, plain_masks, row))
        assert max(errors.values()) < 2e-2, (lengths, errors)
    release_graphs(decoder_layers(model))


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_gpu_usable(on_gpu):
    """A layer that waits for the GPU can't be recorded. What follows computes as ever."""
    (model, masks), (plain, plain_masks) = on_gpu(), on_gpu()
    masks.reserve(1024)
    last = decoder_layers(model)[2].mlp
    forward = last.forward
    last.forward = lambda x: forward(x) * float(x.detach().isfinite().all())
    stream = torch.cuda.current_stream()
    assert "captur" in graph_layers(model, decoder_layers(model), (1024, 40), 256, "cuda")
    assert torch.cuda.current_stream() == stream
    # Random numbers are refused while the generator expects a capture.
    assert torch.randn(9, device="cuda").isfinite().all()
    row = collate(examples(250, 200), PackingSpec(1024, 256))
    errors = relative_errors(gpu_step(model, masks, row), gpu_step(plain, plain_masks, row))
    assert max(errors.values()) < 2e-2, errors
