"""What `./launch.sh check` found on this machine, kept for the runs that follow: which kernels are right, how fast, and the ceilings.

It counts as long as everything that it was found with is the same: machine, GPUs, versions, the checks' and the kernels' sources.
One JSON file in the user's cache folder, the owner's alone. Without one a run starts as ever.
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
    """The file of this machine and these versions, whether it is there or not."""
    versions = {
        d.name: d.version
        for d in importlib.metadata.distributions()
        if d.name.replace("-", "_") in PACKAGES
    }
    gpus = sorted(
        {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    )  # not how many: a run may take fewer
    key = [
        platform.node(),
        platform.machine(),
        os.cpu_count(),
        gpus,
        torch.version.cuda,
        sorted(versions.items()),
    ]
    digest = hashlib.sha256(json.dumps(key).encode())
    digest.update(source_digest("kernels_check", "loop/kernels").encode())
    digest.update((ROOT / "ds_config.json").read_bytes())
    return Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache",
        "soap-loop",
        f"verdicts-{digest.hexdigest()[:16]}.json",
    )


def save(rows: Iterable[dict]) -> Path:
    """Writes the check's rows for later runs, in one step, and returns where."""
    file = results_path()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = file.with_suffix(f".{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump({row["what"]: row for row in rows}, out, indent=1)
    return draft.replace(file)


@functools.cache
def load() -> dict[str, dict]:
    """The rows of the last check by their names; {} where there was none, or it can't be read."""
    try:
        return json.loads(results_path().read_text())
    except (OSError, ValueError):
        return {}


def measured_speedup(what: str) -> float | None:
    """As measured, in the row's unit; None where it was not measured, or not right."""
    row = load().get(what, {})
    return row.get("speed") if row.get("verdict") in ("ok", "slow") else None


def failure_reason(check: str, what: str, *more: str) -> str | None:
    """The first of these rows that was found wrong, in one line; None where none was. Where the row is not there, because the
    check crashed before it, that of the crash."""
    for row in (load().get(name, {}) for name in ((what, *more) if what in load() else (check,))):
        if row.get("verdict") == "wrong":
            error = (
                ""
                if row["error"] is None
                else f", error {row['error']:.1e} over the bound {row['bound']:.0e}"
            )
            return f"wrong by ./launch.sh check: {row['what']} ({row['version']}){error}: {row['note']}"
    return None
