"""The results of `./launch.sh check`, for the runs that follow: which kernels are right, how fast.

They are one JSON file in the user's cache folder, which the owner alone can read. They hold as long
as everything that they were measured with is the same: machine, GPUs, versions, and the sources of
the checks and the kernels. Without a file a run starts all the same.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from ..config.schema import ROOT
from ..config.source import source_digest

# Their versions decide which file is read.
PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "bitsandbytes",
    "flash_attn",
    "flash_attn_4",
)


def results_path() -> Path:
    """The file of this machine and these versions, whether it exists or not."""
    versions = {
        d.name: d.version
        for d in importlib.metadata.distributions()
        if d.name.replace("-", "_") in PACKAGES
    }
    # Not the number of GPUs: a run may use fewer than the check.
    gpus = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    key = [
        platform.node(),
        platform.machine(),
        os.cpu_count(),
        gpus,
        torch.version.cuda,
        sorted(versions.items()),
    ]
    digest = hashlib.sha256(json.dumps(key).encode())
    digest.update(source_digest("kernels_check", "loop/kernels", "loop/fp8").encode())
    digest.update((ROOT / "ds_config.json").read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "soap-loop" / f"verdicts-{digest.hexdigest()[:16]}.json"


def save(rows: Iterable[dict]) -> Path:
    """Writes the check's rows (`kernels_check.rows.Row` as dicts) atomically; returns the file."""
    path = results_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({row["what"]: row for row in rows}, file, indent=1)
    return draft.replace(path)


@functools.cache
def load() -> dict[str, dict]:
    """The rows of the last check by their names; {} where there is none or it can't be read."""
    try:
        return json.loads(results_path().read_text())
    except (OSError, ValueError):
        return {}


def measured_speedup(what: str) -> float | None:
    """The speed of a row in its unit; None where it was not measured or the result was wrong."""
    row = load().get(what, {})
    return row.get("speed") if row.get("verdict") in ("ok", "slow") else None


def failure_reason(check: str, what: str, *more: str) -> str | None:
    """The first of the rows `what` and `more` that is wrong, in one line; None where none is.

    A row is absent where its check crashed before it. The row of the crash, `check`, stands in.
    """
    rows = load()
    names = (what, *more) if what in rows else (check,)
    for name in names:
        row = rows.get(name, {})
        if row.get("verdict") != "wrong":
            continue
        error = ""
        if row["error"] is not None:
            error = f", error {row['error']:.1e} over the bound {row['bound']:.0e}"
        result = f"{row['what']} ({row['version']}){error}: {row['note']}"
        return f"wrong by ./launch.sh check: {result}"
    return None
