"""Whether a run's frozen weights can be multiplied in FP8 here."""

from __future__ import annotations

import torch

from ..config.device import asked_for_cpu
from ..config.schema import Config, ConfigError
from ..distributed.world import Ranks
from ..kernels import check_results
from .products import ERROR_BOUND, product, quantize_rows

LEAST_CAPABILITY = (8, 9)  # Ada, Hopper and newer have FP8 products
MULTIPLE = 16  # of which inputs and outputs of a layer are
SIZES = (300, 416, 208)  # tokens, inputs and outputs of the product that is tested
REMEDY = "set compute=bf16"
# Of ./launch.sh check.
FP8_ROWS = ("fp8 product, forward", "fp8 product, gradient of the input")


def admit_fp8(config: Config, ds_config: dict, model_config) -> None:
    """Raises ConfigError where compute=fp8 can't run here; asked before anything heavy.

    model_config: the base's transformers configuration.
    """
    if config.compute != "fp8":
        return
    if reason := missing_hardware():
        raise ConfigError(f"compute=fp8: {reason}; {REMEDY}")
    if not ds_config.get("bf16", {}).get("enabled"):
        raise ConfigError(f"compute=fp8: needs bf16 enabled in {config.deepspeed}; {REMEDY}")
    for name, width in layer_widths(model_config).items():
        if width % MULTIPLE:
            raise ConfigError(
                f"compute=fp8: this base's {name} is {width}, no multiple of {MULTIPLE}; {REMEDY}"
            )


def missing_hardware() -> str | None:
    """Why no FP8 product runs on this machine's GPUs; None where all have them."""
    if asked_for_cpu() or not torch.cuda.is_available():
        return "needs an NVIDIA GPU of compute capability 8.9 or newer, and this is a CPU"
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        if (major, minor) < LEAST_CAPABILITY:
            return (
                f"needs compute capability 8.9 or newer, and GPU {number}, "
                f"{torch.cuda.get_device_name(number)}, has {major}.{minor}"
            )
    return None


def layer_widths(model_config) -> dict[str, int]:
    """Inputs and outputs of a decoder layer's linear layers, by what a base's config.json has."""
    heads = model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    inner = model_config.intermediate_size
    return {
        "hidden_size": model_config.hidden_size,
        "intermediate_size": max(inner) if isinstance(inner, (list, tuple)) else inner,
        "num_attention_heads * head_dim": heads * model_config.head_dim,
        "num_key_value_heads * head_dim": kv_heads * model_config.head_dim,
    }


def require_right_products(config: Config, fused: bool, why_not: str, ranks: Ranks) -> None:
    """With compute=fp8: runs a small product on each rank, and reads what ./launch.sh check found.

    Raises ConfigError, on all ranks, where one of them is wrong, or where layers are not fused, and
    why not. Every rank must call it.
    """
    if config.compute != "fp8":
        return
    if not fused:
        raise ConfigError(f"compute=fp8: needs fused layers; {why_not}; {REMEDY}")
    problem = check_results.failure_reason("fp8", *FP8_ROWS) or product_problem(ranks.device)
    for found in ranks.all_gather_json(problem):
        if found:
            raise ConfigError(f"compute=fp8: {found}; {REMEDY}")


def product_problem(device: torch.device) -> str | None:
    """Why products in FP8 are not to be used on this device, None where they are right."""
    tokens, inputs, outputs = SIZES
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator).bfloat16()
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    try:
        codes = [quantize_rows(matrix.to(device)) for matrix in (x, weight)]
        y = product(*codes, torch.bfloat16).cpu().float()
    except Exception as error:  # a compiler that is missing, a torch without this product
        message = (str(error).strip().splitlines() or [""])[0][:120]
        return f"{type(error).__name__}: {message}"
    exact = x.float() @ weight.float().t()
    error = ((y - exact).norm() / exact.norm()).item()
    if not error < ERROR_BOUND:
        return f"a product's error is {error:.1e} against fp32, over the bound {ERROR_BOUND:.0e}"
    return None
