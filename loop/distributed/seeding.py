"""The random generators of a rank: seeded, saved and restored; and sums in a fixed order."""

import os
import random

import numpy as np
import torch


def use_deterministic_kernels(on: bool) -> None:
    """Makes GPUs sum in a fixed order, where a kernel offers one; call it before any GPU work.

    A kernel without such an order runs as it is. `train --verify-resume` shows what that means.
    """
    if on:
        # cuBLAS reads it at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on, warn_only=True)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict:
    """The state of every generator of this rank, in JSON's types."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "torch": _to_hex(torch.get_rng_state()),
        "python": [version, list(words), gauss],
        "numpy": {
            **numpy,
            "state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]},
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict) -> None:
    """Restores what `get_rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
