"""Decoder layers as CUDA graphs: what Python launches kernel by kernel is recorded once and then replayed by one call a layer and direction.

A step of TinyLlama launches some 4,000 short kernels, and a fast GPU waits for Python. A graph has fixed addresses: so it is for a run whose
ranks keep their weights whole and in their places (`spare.replicate_weights`), and for rows of one size, for which `collate.pad` fills a
row with documents that nothing is learnt from. Whatever else comes along (an evaluation, a generation) runs as it did.
"""

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..data.batch_plan import PackingSpec
from ..data.collate import collate


class _Replay(torch.autograd.Function):
    """A layer's forward and backward pass. Its input lies where the layer before wrote it, so that only the first one copies."""

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
        return None, *(
            gradient.detach() for gradient in graphed.gradients
        )  # DeepSpeed copies them before the next replay


class StaticInputs:
    """What all decoder layers get beside their input, its tensors at fixed addresses."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.live, self.structure = tree_flatten((args, kwargs))  # what was copied last
        self.fixed = [
            leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.live
        ]
        self.args, self.kwargs = tree_unflatten(self.fixed, self.structure)

    def take(self, args: tuple, kwargs: dict) -> bool:
        """Copies what is new. False where something is of another kind or shape than in the capture."""
        leaves, structure = tree_flatten((args, kwargs))
        if structure != self.structure:
            return False
        for i, (fixed, leaf) in enumerate(zip(self.fixed, leaves)):
            if leaf is self.live[i]:
                continue
            if not isinstance(leaf, torch.Tensor) or not isinstance(fixed, torch.Tensor):
                if type(leaf) is not type(fixed) or leaf != fixed:
                    return False
            elif leaf.shape != fixed.shape:
                return False
            else:
                fixed.copy_(leaf)
            self.live[i] = leaf
        return True


class GraphedLayer:
    """In the place of a decoder layer's forward."""

    def __init__(self, layer: nn.Module, arguments: StaticInputs) -> None:
        self.layer, self.plain, self.arguments = layer, layer.forward, arguments
        self.weights = list(layer.parameters())
        self.trained = [p for p in self.weights if p.requires_grad]

    def capture_forward(self, x: torch.Tensor, pool) -> torch.Tensor:
        self.x, self.forward_graph = x.detach().requires_grad_(), torch.cuda.CUDAGraph()
        self.addresses = [p.data_ptr() for p in self.weights]
        with torch.cuda.graph(self.forward_graph, pool=pool):
            self.y = self.plain(self.x, *self.arguments.args, **self.arguments.kwargs)
        return self.y

    def capture_backward(self, dy: torch.Tensor, pool) -> torch.Tensor:
        self.dy, self.backward_graph = dy, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.backward_graph, pool=pool):
            self.gradients = torch.autograd.grad(self.y, [self.x, *self.trained], dy)
        self.y = self.y.detach()
        return self.gradients[0]

    def error(self) -> float:
        """How far a replay is from the layer itself, on random numbers: the largest relative difference of its output and all gradients."""
        generator = torch.Generator(self.x.device).manual_seed(0)  # the run's own stays as it is
        self.x.data.normal_(generator=generator)
        dy = torch.empty_like(self.dy).normal_(generator=generator)
        y = self.plain(self.x, *self.arguments.args, **self.arguments.kwargs)
        wanted = [y.detach(), *torch.autograd.grad(y, [self.x, *self.trained], dy)]
        self.forward_graph.replay()
        self.dy.copy_(dy)  # not before: its place may have held what the forward pass was done with
        self.backward_graph.replay()
        apart = [
            (a - b).float().norm() / b.float().norm().clamp_min(1e-30)
            for a, b in zip([self.y, *self.gradients], wanted)
        ]
        return torch.stack(apart).max().item()

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if (
            self.layer.training
            and torch.is_grad_enabled()
            and x.shape == self.x.shape
            and [p.data_ptr() for p in self.weights] == self.addresses
            and self.arguments.take(args, kwargs)
        ):
            return _Replay.apply(self, x, *self.trained)
        return self.plain(x, *args, **kwargs)


def graph_layers(
    model: nn.Module, layers: nn.ModuleList, room: tuple[int, int], max_seq_len: int, device
) -> str | None:
    """Captures each layer of the engine's model for rows of `room`, and replays it beside the layer itself. Where something can't be captured or
    comes out otherwise, all stays as it was, and what is in the way is returned. The dropout's masks must have got their place for such a
    row already."""
    before = torch.cuda.current_stream()
    try:
        graphed = capture(model, layers, room, max_seq_len, device)
        errors = [g.error() for g in graphed]
    # A kernel that waits for the GPU or refuses, too little memory, another signature.
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as problem:
        torch.cuda.set_stream(
            before
        )  # a capture that fails leaves its own in place, and the generators as if it went on
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())  # the same numbers from here on
        return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:120]
    if wrong := [
        error for error in errors if not error < 1e-2
    ]:  # bf16, and attention's backward pass adds in any order: some 1e-3
        return f"a replay is {wrong[0]:.1e} from the layer itself"
    for layer, g in zip(layers, graphed):
        layer.forward = g
    return None


def capture(
    model: nn.Module, layers: nn.ModuleList, room: tuple[int, int], max_seq_len: int, device
) -> list[GraphedLayer]:
    """Each layer's two graphs, recorded on a row of fill. Raises whatever is in the way, ValueError where layers get different arguments."""
    calls: list[tuple] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        with torch.no_grad():
            packing = PackingSpec(room[0], max_seq_len, padded_shape=room)
            model(**collate([], packing).to(device).model_inputs())
    finally:
        for hook in hooks:
            hook.remove()
    (x, *args), kwargs = calls[0]
    leaves = [tree_flatten((args, kwargs))[0] for (_, *args), kwargs in calls]
    if any(a is not b for others in leaves for a, b in zip(others, leaves[0], strict=True)):
        raise ValueError("layers get different arguments")
    arguments = StaticInputs(tuple(args), kwargs)
    graphed, pool = (
        [GraphedLayer(layer, arguments) for layer in layers],
        torch.cuda.graph_pool_handle(),
    )
    torch.cuda.synchronize()  # what the forward pass above wrote is read on other streams
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with torch.cuda.stream(
            torch.cuda.Stream()
        ):  # kernels are compiled and handles made before anything is recorded
            y = graphed[0].plain(x, *arguments.args, **arguments.kwargs)
            torch.autograd.grad(y, [x, *graphed[0].trained], torch.zeros_like(y))
            del y
        torch.cuda.synchronize()
        for g in graphed:
            x = g.capture_forward(x, pool)
        dy = torch.zeros_like(x)
        for g in reversed(graphed):
            dy = g.capture_backward(dy, pool)
    return graphed


def release_graphs(layers: nn.ModuleList) -> None:
    """Lets layers run as they did. Their activations' memory, kept between replays, is free again."""
    for layer in layers:
        if isinstance(layer.forward, GraphedLayer):
            layer.forward = layer.forward.plain
            torch.cuda.empty_cache()
