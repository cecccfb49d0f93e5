"""Decoder layers as CUDA graphs: their kernels are recorded once and replayed by one call.

A step of TinyLlama launches some 4,000 short kernels, and a fast GPU waits for Python. As graphs a
layer takes one call for each direction. A graph has fixed addresses. So it needs weights that stay
where they are (`zero3/replicated.py`) and rows of one size, which `data/collate.py` pads with
documents that nothing is learnt from. Anything else (an evaluation, a generation) runs as before.
"""

from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..config.error_text import first_line
from ..data.batch_plan import PackingSpec
from ..data.collate import collate
from ..distributed.progress import Progress

BOUND = 1e-2  # of a replay's relative error: bf16, and attention's backward pass adds in any order


class _Replay(torch.autograd.Function):
    """A layer's forward and backward pass by its graphs.

    A layer's input lies where the layer before wrote its output. So only the first one copies.
    """

    @staticmethod
    def forward(ctx, graphed: "GraphedLayer", x, *trained):
        ctx.graphed = graphed
        if x.data_ptr() != graphed.x.data_ptr():
            graphed.x.data.copy_(x)
        graphed.forward_graph.replay()
        return graphed.y.detach()

    @staticmethod
    def backward(ctx, dy):
        graphed = ctx.graphed
        if dy.data_ptr() != graphed.dy.data_ptr():
            graphed.dy.copy_(dy)
        graphed.backward_graph.replay()
        # DeepSpeed copies the gradients before the next replay.
        return None, *(gradient.detach() for gradient in graphed.gradients)


class StaticInputs:
    """The arguments that all decoder layers get beside their input, tensors at fixed addresses."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.latest, self.structure = tree_flatten((args, kwargs))  # the objects copied last
        self.static = [
            leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.latest
        ]
        self.args, self.kwargs = tree_unflatten(self.static, self.structure)

    def update(self, args: tuple, kwargs: dict) -> bool:
        """Copies what has changed since the last call.

        Returns False where something has another type, shape or value than a graph was made for.
        """
        leaves, structure = tree_flatten((args, kwargs))
        if structure != self.structure:
            return False
        for i, (static, leaf) in enumerate(zip(self.static, leaves)):
            if leaf is self.latest[i]:
                continue
            if isinstance(leaf, torch.Tensor) and isinstance(static, torch.Tensor):
                if leaf.shape != static.shape:
                    return False
                static.copy_(leaf)
            elif type(leaf) is not type(static) or leaf != static:
                return False
            self.latest[i] = leaf
        return True


class GraphedLayer:
    """Replaces a decoder layer's forward: replays its graphs, or runs the layer where they differ.

    x [1, T, H] and dy [1, T, H] are the static inputs of the forward and the backward graph, y and
    gradients (of x and of each trained weight) their static outputs.
    """

    def __init__(self, layer: nn.Module, inputs: StaticInputs) -> None:
        self.layer = layer
        self.eager_forward: Any = layer.forward
        self.inputs = inputs
        self.weights = list(layer.parameters())
        self.trained = [p for p in self.weights if p.requires_grad]

    def run_eagerly(self, x: torch.Tensor) -> torch.Tensor:
        """The layer itself, with the static inputs."""
        return self.eager_forward(x, *self.inputs.args, **self.inputs.kwargs)

    def capture_forward(self, x: torch.Tensor, pool) -> torch.Tensor:
        """Records the forward pass; returns its output, the next layer's input."""
        self.x = x.detach().requires_grad_()
        self.forward_graph = torch.cuda.CUDAGraph()
        self.addresses = [p.data_ptr() for p in self.weights]
        with torch.cuda.graph(self.forward_graph, pool=pool):
            self.y = self.run_eagerly(self.x)
        return self.y

    def capture_backward(self, dy: torch.Tensor, pool) -> torch.Tensor:
        """Records the backward pass; returns the gradient of the layer's input."""
        self.dy = dy
        self.backward_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.backward_graph, pool=pool):
            self.gradients = torch.autograd.grad(self.y, [self.x, *self.trained], dy)
        self.y = self.y.detach()
        return self.gradients[0]

    def replay_error(self) -> float:
        """How far a replay is from the layer itself, on random numbers.

        It is the largest relative difference of the output and of all gradients. The run's own
        generator is left as it is.
        """
        generator = torch.Generator(self.x.device).manual_seed(0)
        self.x.data.normal_(generator=generator)
        dy = torch.empty_like(self.dy).normal_(generator=generator)
        y = self.run_eagerly(self.x)
        wanted = [y.detach(), *torch.autograd.grad(y, [self.x, *self.trained], dy)]
        self.forward_graph.replay()
        # Not before: the forward graph may use dy's memory, which was free when it was recorded.
        self.dy.copy_(dy)
        self.backward_graph.replay()
        errors = [
            (ours - exact).float().norm() / exact.float().norm().clamp_min(1e-30)
            for ours, exact in zip([self.y, *self.gradients], wanted)
        ]
        return torch.stack(errors).max().item()

    def can_replay(self, x: torch.Tensor) -> bool:
        """Whether this is a training pass, for a row of the recorded size, with unmoved weights."""
        return (
            self.layer.training
            and torch.is_grad_enabled()
            and x.shape == self.x.shape
            and [p.data_ptr() for p in self.weights] == self.addresses
        )

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.can_replay(x) and self.inputs.update(args, kwargs):
            return _Replay.apply(self, x, *self.trained)
        return self.eager_forward(x, *args, **kwargs)


def graph_layers(
    model: nn.Module,
    layers: nn.ModuleList,
    padded_shape: tuple[int, int],
    max_seq_len: int,
    device,
) -> str | None:
    """Captures each decoder layer and compares its replay with the layer itself.

    Where that fails, everything stays as it was and the reason is returned; None where all is well.

    Args:
        model: the engine's model. Its dropout masks must have their address for such a row already.
        padded_shape: (tokens, documents) of every row that is to be replayed.
        max_seq_len: tokens of the longest document.
    """
    stream = torch.cuda.current_stream()
    try:
        graphed = capture(model, layers, padded_shape, max_seq_len, device)
        errors = [g.replay_error() for g in graphed]
    # A kernel that waits for the GPU or refuses, too little memory, another signature.
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as problem:
        undo_failed_capture(stream)
        return first_line(problem, 120)
    for error in errors:
        if not error < BOUND:  # some 1e-3 is usual; a NaN is not
            return f"a replay is {error:.1e} from the layer itself"
    for layer, g in zip(layers, graphed):
        layer.forward = g
    return None


def undo_failed_capture(stream) -> None:
    """Resets what a failed capture leaves: its own stream, and generators that expect a capture.

    stream: the one that was current before. The generators give the same numbers from here on.
    """
    torch.cuda.set_stream(stream)
    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())


def capture(
    model: nn.Module,
    layers: nn.ModuleList,
    padded_shape: tuple[int, int],
    max_seq_len: int,
    device,
) -> list[GraphedLayer]:
    """Each layer's two graphs, recorded on a row of padding. The arguments are `graph_layers`'.

    Raises whatever prevents a capture, and ValueError where layers get different arguments.
    """
    packing = PackingSpec(padded_shape[0], max_seq_len, padded_shape=padded_shape)
    batch = collate([], packing).to(device)
    x, inputs = record_inputs(model, layers, batch.model_inputs())
    graphed = [GraphedLayer(layer, inputs) for layer in layers]
    pool = torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()  # what the forward pass above wrote is read on other streams
    waiting = Progress("capturing CUDA graphs", 2 * len(graphed), "graphs")
    with torch.enable_grad(), waiting as progress:
        x = x.detach().requires_grad_()
        warm_up(graphed[0], x)
        for g in graphed:
            x = g.capture_forward(x, pool)
            progress.advance()
        dy = torch.zeros_like(x)
        for g in reversed(graphed):
            dy = g.capture_backward(dy, pool)
            progress.advance()
    return graphed


def record_inputs(
    model: nn.Module, layers: nn.ModuleList, model_inputs: dict
) -> tuple[torch.Tensor, StaticInputs]:
    """Runs the model and returns (the first layer's input, what all layers get beside it).

    Raises ValueError where that differs from layer to layer.
    """
    calls: list[tuple] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        with torch.no_grad():
            model(**model_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    (x, *args), kwargs = calls[0]
    first, *others = (tree_flatten((args, kwargs))[0] for (_, *args), kwargs in calls)
    for leaves in others:
        if any(a is not b for a, b in zip(leaves, first, strict=True)):
            raise ValueError("layers get different arguments")
    return x, StaticInputs(tuple(args), kwargs)


def warm_up(graphed: GraphedLayer, x: torch.Tensor) -> None:
    """Runs a layer on a stream of its own: kernels are compiled and library handles made.

    Nothing of the kind may happen while a graph is recorded.
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        y = graphed.run_eagerly(x)
        torch.autograd.grad(y, [x, *graphed.trained], torch.zeros_like(y))
    torch.cuda.synchronize()


def release_graphs(layers: nn.ModuleList) -> None:
    """Lets layers run as before. The memory that graphs keep between replays is free again."""
    for layer in layers:
        if isinstance(layer.forward, GraphedLayer):
            layer.forward = layer.forward.eager_forward
            torch.cuda.empty_cache()
