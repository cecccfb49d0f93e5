"""Which attention runs here: the fastest that is installed, was not found wrong, and was just seen to keep documents apart.

Speed on the check's small rows shows launch overhead, so the order is fixed (attention.BACKENDS)."""

import importlib.metadata

import torch

from . import check_results
from .attention import BACKENDS, LOADERS, AttentionError, packed_attention

COSTS = {
    "varlen": "the same algorithm, from torch",
    "sdpa": "costs a kernel call for each document",
}  # said of a fallback


def available_backends(device: torch.device | str) -> dict[str, str]:
    """For each backend its version where it can run on this device, otherwise "missing: " and the reason."""
    capability = (
        torch.cuda.get_device_capability(device) if torch.device(device).type == "cuda" else None
    )
    found = {}
    for name, load in LOADERS.items():
        least = 9 if name == "flash_attn_4" else 8
        if capability is None or capability[0] < least:
            found[name] = (
                f"missing: needs {'an NVIDIA GPU' if capability is None else f'compute capability {least}.0 or newer'}"
            )
            continue
        try:
            load()
            found[name] = (
                f"torch {torch.__version__}"
                if name == "varlen"
                else importlib.metadata.version(name.replace("_", "-"))
            )
        except Exception as error:  # not installed, built for another torch (undefined symbol), or a compiler of another version
            found[name] = (
                f"missing: {(str(error).splitlines() or [type(error).__name__])[0][-120:]}"
            )
    return found | {"sdpa": f"torch {torch.__version__}"}


@torch.enable_grad()
def keeps_documents_apart(backend: str, device, heads: tuple[int, int, int]) -> bool:
    """Runs the kernel: the second document's output must not move by a bit when the first one's tokens change, and has no gradient in them."""
    (queries, keys, size), generator = heads, torch.Generator(device=device).manual_seed(0)
    q, k, v = row = [
        torch.randn(96, n, size, device=device, generator=generator).bfloat16().requires_grad_()
        for n in (queries, keys, keys)
    ]
    bounds = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    before = packed_attention(q, k, v, bounds, 64, backend)
    gradients = torch.autograd.grad(before[40:].float().square().sum(), row)
    with torch.no_grad():
        for x in row:
            x[:40].neg_()
        after = packed_attention(q, k, v, bounds, 64, backend)
        own = torch.equal(before[40:], after[40:]) and not any(g[:40].any() for g in gradients)
        return (
            own
            and not torch.equal(before[:40], after[:40])
            and all(bool(x.isfinite().all()) for x in (before, *gradients))
        )


def choose_backend(
    wanted: str, device, dtype: torch.dtype, heads: tuple[int, int, int] = (4, 4, 64)
) -> tuple[str, str]:
    """Returns (backend, remark): `wanted`, or with "auto" the fastest one that runs such `heads` (of queries, of keys and values, their size)
    here, was not found wrong by `./launch.sh check` (if it was run) and was just seen to keep documents apart. What was passed over stands in
    the remark after "; ". Raises AttentionError when `wanted` can't run, leaks, or was found wrong."""
    found = available_backends(device)
    remarks: list[str] = []
    for name in BACKENDS if wanted == "auto" else (wanted,):
        reason = found.get(name, f"missing: one of auto, {', '.join(BACKENDS)} is possible")
        if (
            not reason.startswith("missing")
            and name != "sdpa"
            and dtype not in (torch.bfloat16, torch.float16)
        ):
            reason = f"missing: takes bf16 or fp16, not {dtype}"
        if row := check_results.failure_reason(
            "attention", f"attention {name}", f"attention {name}, leak"
        ):
            reason = row
        if not reason.startswith(("missing", "wrong")):
            try:
                if keeps_documents_apart(name, device, heads):
                    cost = [f"instead {name}: {COSTS[name]}"] if remarks and name in COSTS else []
                    return name, "; ".join([f"attention: {name} ({reason})", *remarks, *cost])
                reason = "wrong: it leaks between documents on this machine"
            except Exception as error:  # what a kernel can't do it says in its own way
                reason = f"wrong: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        if wanted != "auto":
            raise AttentionError(
                f"attention={wanted}: {reason}; use attention=auto, or see ./launch.sh check"
            )
        if (
            name != "flash_attn_4" or "capability" not in reason
        ):  # nobody can mend an older card, which has the next one
            remarks.append(f"{name} {reason}")
    raise AttentionError("attention=auto: no backend works here: " + "; ".join(remarks))
