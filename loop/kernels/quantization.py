"""How the frozen base is stored in fewer bits: one object a kind, in the table `QUANTIZATIONS`.

A new kind is a subclass of `Quantization` and an entry in the table, under the name that
`Config.quantization` and trained.json give it. Loading, fused layers, the memory estimate, the
export and merging ask the table. Only export/standalone_loss.py does not: it imports nothing of
this project, and loads an adapter as anybody would.
"""

from abc import ABC, abstractmethod
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn as nn
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from transformers import BitsAndBytesConfig


class Quantization(ABC):
    """What differs between the ways to store the weights of frozen linear layers."""

    lora_layer: type[nn.Module]  # PEFT's LoRA around a quantised layer; a plain one adds s B A x

    @abstractmethod
    def transformers_config(self, dtype: torch.dtype, double_quant: bool = True) -> Any:
        """The `quantization_config` of `from_pretrained`.

        dtype: of the computation; double_quant: whether the scales are quantised as well.
        """

    @abstractmethod
    def describes(self, config: Any) -> bool:
        """Whether a quantised base's own `quantization_config` is of this kind."""

    @abstractmethod
    def is_quantized(self, module: nn.Module) -> bool:
        """Whether a module is a linear layer whose weight is stored in this way.

        It has `in_features`, `out_features` and `compute_dtype`, as bitsandbytes' have.
        """

    @abstractmethod
    def dequantize(self, module: Any, dtype: torch.dtype) -> torch.Tensor:
        """The weight of a quantised layer, [N, K] in dtype."""

    @abstractmethod
    def quantized_parameter(
        self, module: Any, value: torch.Tensor, state: dict[str, torch.Tensor], device
    ) -> nn.Parameter:
        """The weight of a layer that transformers has prepared, on device.

        value: the plain weight [N, K]; or, with a state, saved codes.
        state: what a weight that was saved quantised has beside its codes; else {}.
        """

    @abstractmethod
    def round_trip(self, weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
        """A plain weight, quantised and dequantised: same shape and dtype."""

    def keep_codes(self, module: Any, dtype: torch.dtype) -> None:
        """Makes sure that nothing ever rewrites the codes of a quantised layer after loading."""

    @abstractmethod
    def state_tensors(self, module: Any) -> list[torch.Tensor]:
        """What a quantised layer holds beside its codes: scales and the like, on every rank."""

    @abstractmethod
    def code_bytes(self, num_weights: int) -> int:
        """Bytes of the codes of a weight. ZeRO-3 shards them."""

    @abstractmethod
    def state_bytes(self, num_weights: int, double_quant: bool) -> int:
        """Bytes of what stands beside the codes of a weight. Every rank has all of it."""

    @abstractmethod
    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the tensor that holds the codes, when dtype is computed with."""


class NF4(Quantization):
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), by bitsandbytes."""

    lora_layer = PeftLinear4bit

    def transformers_config(
        self, dtype: torch.dtype, double_quant: bool = True
    ) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=self.storage_dtype(dtype),
        )

    def describes(self, config: Any) -> bool:
        return getattr(config, "load_in_4bit", False)

    def is_quantized(self, module: nn.Module) -> bool:
        return isinstance(module, bnb.nn.Linear4bit)

    def dequantize(self, module: Any, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)

    def quantized_parameter(
        self, module: Any, value: torch.Tensor, state: dict[str, torch.Tensor], device
    ) -> nn.Parameter:
        if state:
            return bnb.nn.Params4bit.from_prequantized(value, state, device=device, module=module)
        options = vars(module.weight) | {"requires_grad": False}  # of the empty parameter
        return bnb.nn.Params4bit(value, **options).to(device)  # type: ignore[misc]  # overloads

    def round_trip(self, weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
        codes, state = quantize_4bit(
            weight.contiguous(), quant_type="nf4", compress_statistics=double_quant
        )
        return dequantize_4bit(codes, state)

    def keep_codes(self, module: Any, dtype: torch.dtype) -> None:
        """bitsandbytes would repack codes on CPUs with AVX512-BF16 at the first evaluation.

        ZeRO-3's shards would be wrong then. A base that was quantised elsewhere may store its codes
        as float16, which the engine would cast by value, and compute in another dtype than ours.
        """
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype = dtype
        is_shard = hasattr(module.weight, "ds_id")  # shards are not cast
        if module.weight.dtype not in (dtype, torch.uint8) and not is_shard:
            module.weight.data = module.weight.data.view(torch.uint8)

    def state_tensors(self, module: Any) -> list[torch.Tensor]:
        state = module.weight.quant_state
        nested = getattr(state, "state2", None)  # of the scales, with double quantisation
        return [t for s in (state, nested) if s is not None for t in (s.absmax, s.code)]

    def code_bytes(self, num_weights: int) -> int:
        return num_weights // 2

    def state_bytes(self, num_weights: int, double_quant: bool) -> int:
        """A scale for 64 weights, in fp32 or quantised, and the code's 16 values.

        Quantised scales are bytes. They have one scale for 256 of them, an offset, and the code's
        256 values, all in fp32.
        """
        scales = -(-num_weights // 64)
        code = 4 * 16
        if not double_quant:
            return 4 * scales + code
        return scales + 4 * (-(-scales // 256) + 1 + 256) + code

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The engine's own dtype where that is bfloat16, else bytes.

        ZeRO-3 casts floating-point storage to the engine's dtype by value, which would garble
        packed codes. A cast to the same dtype changes nothing, and bytes are never cast.
        """
        return torch.bfloat16 if dtype == torch.bfloat16 else torch.uint8


QUANTIZATIONS: dict[str, Quantization] = {"nf4": NF4()}


def find_quantization(module: nn.Module) -> Quantization | None:
    """How the weight of a module is stored; None for plain weights."""
    for quantization in QUANTIZATIONS.values():
        if quantization.is_quantized(module):
            return quantization
    return None
