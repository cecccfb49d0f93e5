"""The decoder layers' weights as a model that writes needs them: in 16 bits, in few products.

Writing reads all weights for each token. Codes of 4 bits would be dequantised for each token, so
they are dequantised once, for as long as notes are written. LoRA stays beside the weight, as it was
trained: merged into it, it would be rounded away in part.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels.fuse import fuse_norm, fuse_rotary, is_plain_lora, is_swiglu
from ..kernels.lora_ops import swiglu_joint
from ..kernels.patches import is_rotary_patched, restore_rotary
from ..kernels.quantization import find_quantization

# Linear layers that get the same input where a model has them.
OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ALIGNMENT = 8  # rows of LoRA's A; kernels for other sizes are slower
FEW_ROWS = 64  # of a step; more are computed by kernels for many


class Linear(NamedTuple):
    """What a linear layer computes: x W^T + bias + s (x A^T) B^T."""

    base: Any  # the module with weight and bias
    lora: tuple[torch.Tensor, torch.Tensor, float] | None  # A [r, K], B [N, r], s

    @property
    def dtype(self) -> torch.dtype:
        return self.base.compute_dtype if find_quantization(self.base) else self.base.weight.dtype

    def weight(self) -> torch.Tensor:
        """W [N, K]."""
        quantization = find_quantization(self.base)
        return quantization.dequantize(self.base, self.dtype) if quantization else self.base.weight


def read_linear(module: Any) -> Linear | None:
    """What a module computes where it is a linear layer, plain, quantised or with a plain LoRA."""
    if is_plain_lora(module) and not module.disable_adapters:
        (name,) = module.active_adapters
        a = module.lora_A[name].weight
        b = module.lora_B[name].weight
        return Linear(module.base_layer, (a, b, module.scaling[name]))
    if find_quantization(module) or type(module) is nn.Linear:
        return Linear(module, None)
    return None


class JointProduct:
    """Linear layers of one input, by one product with W and A of all and one with B of all."""

    @torch.no_grad()
    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears
        rank = sum(len(linear.lora[0]) for linear in linears if linear.lora)
        rank += -rank % ALIGNMENT
        weights = [linear.weight() for linear in linears]
        self.sizes = [len(weight) for weight in weights]
        self.width = sum(self.sizes)
        weights.append(weights[0].new_zeros(rank, weights[0].shape[1]))
        self.weight = torch.cat(weights)  # [N + r, K]
        self.b = self.weight.new_zeros(self.width, rank) if rank else None
        self.bias = self._joint_bias(linears)
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = []
        self.read_lora()

    @torch.no_grad()
    def read_lora(self) -> None:
        """Copies A and s B of each layer, as they are now, to their places.

        They are the last rows of W, and blocks of B [N, r]: each output reads its own part of
        x A^T.
        """
        row = column = 0
        for linear, size in zip(self.linears, self.sizes):
            if linear.lora and self.b is not None:
                a, b, scaling = linear.lora
                end = column + len(a)
                self.weight[self.width + column : self.width + end] = a
                self.b[row : row + size, column:end] = b * scaling
                column = end
            row += size

    def _joint_bias(self, linears: list[Linear]) -> torch.Tensor | None:
        if all(linear.base.bias is None for linear in linears):
            return None
        bias = self.weight.new_zeros(len(self.weight))
        for part, linear in zip(bias.split(self.sizes + [len(bias) - self.width]), linears):
            if linear.base.bias is not None:
                part.copy_(linear.base.bias)
        return bias

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The output of each layer, [..., N], of x [..., K]."""
        out = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        y = out[:, : self.width]
        if self.b is not None:
            y.addmm_(out[:, self.width :], self.b.t())
        return [part.view(*x.shape[:-1], -1) for part in y.split(self.sizes, dim=1)]

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) up [..., N], of the two layers gate and up."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW_ROWS or self.b is None or self.bias is not None:
            gate, up = self.compute(x)
            return F.silu(gate) * up
        out = swiglu_joint(F.linear(rows, self.weight), self.b)
        return out.view(*x.shape[:-1], -1)

    def fetch(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """The output of layer `number`. Layers are called in turn with the same tensor object."""
        if self.input is not x or self.outputs[number] is None:
            self.input = x
            self.outputs = list(self.compute(x))
        output = self.outputs[number]
        assert output is not None
        self.outputs[number] = None
        if not any(other is not None for other in self.outputs):
            self.input = None
        return output


def joint_linears(layers: nn.Module) -> list[tuple[list[Any], list[Linear]]]:
    """(modules, what they compute) of each group of linear layers that is worth a copy.

    A plain layer without LoRA is fast as it is.
    """
    found: list[tuple[list[Any], list[Linear]]] = []
    seen: set[nn.Module] = set()

    def add(modules: list[Any]) -> None:
        linears = list(filter(None, map(read_linear, modules)))
        worth = any(linear.lora or find_quantization(linear.base) for linear in linears)
        alike = len({(linear.dtype, linear.base.in_features) for linear in linears}) == 1
        if len(linears) == len(modules) and worth and alike and not seen.intersection(modules):
            found.append((modules, linears))
            for module in modules:
                seen.update(module.modules())

    for module in layers.modules():
        for names in OF_ONE_INPUT:
            if all(hasattr(module, name) for name in names):
                add([getattr(module, name) for name in names])
    for module in layers.modules():
        add([module])
    return found


def dense_bytes(layers: nn.Module) -> int:
    """Bytes of the copies that `DenseWeights` makes, without LoRA's."""
    return sum(
        linear.base.in_features * linear.base.out_features * linear.dtype.itemsize
        for _, linears in joint_linears(layers)
        for linear in linears
    )


class DenseWeights:
    """Dequantised copies of decoder layers' weights, by which the layers can compute.

    The weights must all be here.
    """

    def __init__(self, layers: nn.Module) -> None:
        self.layers = layers
        self.products = [
            (modules, JointProduct(linears)) for modules, linears in joint_linears(layers)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies, LoRA's among them."""
        return sum(
            product.weight.nbytes + (product.b.nbytes if product.b is not None else 0)
            for _, product in self.products
        )

    def read_lora(self) -> None:
        """LoRA has been trained since; the base is frozen."""
        for _, product in self.products:
            product.read_lora()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Lets the layers compute with the copies, LoRA beside them, and fewer kernels.

        Everything is as it was afterwards.
        """
        with contextlib.ExitStack() as undo:
            for modules, product in self.products:
                for number, module in enumerate(modules):
                    _set_forward(undo, module, lambda x, p=product, n=number: p.fetch(x, n))
            self._fuse_swiglu(undo)
            for module in self.layers.modules():
                if type(module).__name__.endswith("Norm") and "forward" not in vars(module):
                    if fuse_norm(module):
                        undo.callback(vars(module).pop, "forward")
            _fuse_rotary(undo, self.layers)
            yield

    def _fuse_swiglu(self, undo: contextlib.ExitStack) -> None:
        """One kernel between the products of a SwiGLU block."""
        products = {modules[0]: product for modules, product in self.products if len(modules) == 2}
        for block in self.layers.modules():
            product = products.get(getattr(block, "gate_proj", None))
            if product and hasattr(block, "down_proj") and is_swiglu(block):
                _set_forward(undo, block, lambda x, b=block, p=product: b.down_proj(p.swiglu(x)))


def _fuse_rotary(undo: contextlib.ExitStack, layers: nn.Module) -> None:
    """Fuses rotary positions until `undo` is closed, unless they are fused for the process."""
    for module in layers.modules():
        code = sys.modules[type(module).__module__]
        if hasattr(module, "q_proj") and not is_rotary_patched(code):
            fuse_rotary(module)
            undo.callback(restore_rotary, code)


def _set_forward(undo: contextlib.ExitStack, module: nn.Module, forward) -> None:
    """Sets the forward of this one module until `undo` is closed."""
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(vars(module).pop, "forward")
    module.forward = forward
