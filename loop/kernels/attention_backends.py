"""The choice of an attention backend: the fastest that is installed and right on this machine.

A backend is right where `./launch.sh check` did not find it wrong and where it was just seen to
keep documents apart.
"""

import hashlib
import importlib.metadata
import inspect
from pathlib import Path

import torch

from ..config.error_text import first_line
from ..distributed.progress import Progress
from . import check_results
from .attention import ATTENTION_BACKENDS, AttentionBackend, AttentionError, packed_attention


def installed_version(backend: AttentionBackend, device: torch.device | str) -> str:
    """The backend's version where it can run on this device, else "missing: " and the reason."""
    least = backend.min_capability
    if least is not None:
        if torch.device(device).type != "cuda":
            return "missing: needs an NVIDIA GPU"
        if torch.cuda.get_device_capability(device)[0] < least:
            return f"missing: needs compute capability {least}.0 or newer"
    try:
        backend.load()
        if backend.package == "torch":
            return f"torch {torch.__version__}"
        return importlib.metadata.version(backend.package)
    # Not installed, built for another torch (undefined symbol), or a compiler of another version.
    except Exception as error:
        return f"missing: {first_line(error, most=10_000)[-120:]}"  # its end names the symbol


def available_backends(device: torch.device | str) -> dict[str, str]:
    """For each backend its version where it can run here, else "missing: " and the reason."""
    return {name: installed_version(b, device) for name, b in ATTENTION_BACKENDS.items()}


@torch.enable_grad()
def keeps_documents_apart(backend: str, device, heads: tuple[int, int, int]) -> bool:
    """Runs the kernel on a row of two documents and tells whether they stay apart.

    The second document's output must not change by a bit when the first one's tokens do, and must
    have no gradient in them. The first one's output must change, and all must be finite.
    heads: the number of query heads, that of key and value heads, and their size.
    """
    num_query_heads, num_key_heads, head_dim = heads
    generator = torch.Generator(device=device).manual_seed(0)

    def random_tensor(num_heads: int) -> torch.Tensor:
        x = torch.randn(96, num_heads, head_dim, device=device, generator=generator)
        return x.bfloat16().requires_grad_()

    row = [random_tensor(n) for n in (num_query_heads, num_key_heads, num_key_heads)]
    q, k, v = row
    bounds = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    before = packed_attention(q, k, v, bounds, 64, backend)
    gradients = torch.autograd.grad(before[40:].float().square().sum(), row)
    with torch.no_grad():
        for x in row:
            x[:40].neg_()
        after = packed_attention(q, k, v, bounds, 64, backend)
        return (
            torch.equal(before[40:], after[40:])
            and not any(gradient[:40].any() for gradient in gradients)
            and not torch.equal(before[:40], after[:40])
            and all(bool(x.isfinite().all()) for x in (before, *gradients))
        )


def refusal_reason(
    name: str, version: str, device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> str | None:
    """Why a backend can't be used here, None where it can; version: as of `available_backends`."""
    backend = ATTENTION_BACKENDS.get(name)
    missing = version if version.startswith("missing") else None
    if not missing and backend and backend.half_precision_only:
        if dtype not in (torch.bfloat16, torch.float16):
            missing = f"missing: takes bf16 or fp16, not {dtype}"
    failed_check = check_results.failure_reason(
        "attention", f"attention {name}", f"attention {name}, leak"
    )
    if failed_check or missing:
        return failed_check or missing

    def find_problem() -> str | None:
        try:
            if keeps_documents_apart(name, device, heads):
                return None
            return "wrong: it leaks between documents on this machine"
        except Exception as error:  # each kernel has its own way to refuse what it can't do
            return f"wrong: {first_line(error, 120)}"

    source = source_of(backend) if backend else None
    if source is None:  # it could change unseen
        return find_problem()
    test = f"attention {name} ({version}, {source}), heads {heads}: documents stay apart"
    return check_results.run_once(test, device, find_problem)


def source_of(backend: AttentionBackend) -> str | None:
    """A digest of the file that registered a backend, which may be a user's own; None of none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(backend.load))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else None
    except (TypeError, OSError):  # an object that is called, a notebook's cell
        return None


def choose_backend(
    wanted: str, device, dtype: torch.dtype, heads: tuple[int, int, int] = (4, 4, 64)
) -> tuple[str, str]:
    """Returns (backend, note): `wanted` or, with "auto", the fastest one that is right here.

    The note names the backend and its version, then after "; " each one that was skipped and why.

    Args:
        wanted: "auto" or a name in ATTENTION_BACKENDS.
        device: where it shall run.
        dtype: of queries, keys and values.
        heads: the number of query heads, that of key and value heads, and their size.

    Raises AttentionError when `wanted` can't run, leaks, or failed `./launch.sh check`.
    """
    unknown = f"missing: one of auto, {', '.join(ATTENTION_BACKENDS)} is possible"
    skipped: list[str] = []
    for name in ATTENTION_BACKENDS if wanted == "auto" else (wanted,):
        backend = ATTENTION_BACKENDS.get(name)
        version = installed_version(backend, device) if backend else unknown
        with Progress(f"testing attention {name} for leaks between documents"):
            reason = refusal_reason(name, version, device, dtype, heads)
        if reason is None:
            note = [f"attention: {name} ({version})", *skipped]
            cost = ATTENTION_BACKENDS[name].fallback_note
            if skipped and cost:
                note.append(f"instead {name}: {cost}")
            return name, "; ".join(note)
        if wanted != "auto":
            raise AttentionError(
                f"attention={wanted}: {reason}; use attention=auto, or see ./launch.sh check"
            )
        # Nobody can change an older card, and the next backend is there for it.
        if not (ATTENTION_BACKENDS[name].optional_hardware and "capability" in reason):
            skipped.append(f"{name} {reason}")
    raise AttentionError("attention=auto: no backend works here: " + "; ".join(skipped))
