"""Ranks, and how they agree: start-up, sums over ranks, and what each has to tell the others."""

import os
import random

import numpy as np
import torch


def use_deterministic_kernels(on: bool) -> None:
    """Sums in a fixed order on GPUs, too. A kernel that has no such order runs as it is: `train --verify-resume` shows what that makes."""
    if on:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it at its first call
    torch.use_deterministic_algorithms(on, warn_only=True)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict:
    """The state of every generator of this rank, in JSON's types."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    state = {
        "torch": _hex(torch.get_rng_state()),
        "python": [python[0], list(python[1]), python[2]],
        "numpy": numpy
        | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
    }
    return state | ({"cuda": _hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def set_rng_state(state: dict) -> None:
    """Puts back what `rng_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
