"""CUDA, compilers and DeepSpeed's own operators; `packages.py` adds the versions.

In the field: a CPU build of torch on a GPU machine trains at a thousandth of the speed without a word; DeepSpeed compiles an
operator at first use, in the middle of a run, and dies where no compiler or ninja is on PATH.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from kernels_check import packages
from kernels_check.rows import Row, guarded
from kernels_check.table import emit


def check_cuda(driver: str, built_for: str | None) -> Iterator[Row]:
    """`driver`: the version nvidia-smi tells, "" without a GPU; `built_for`: torch.version.cuda."""
    if not driver:
        yield Row(
            "CUDA",
            "",
            "missing",
            note="no NVIDIA driver here: rows that need a GPU are not required",
            required=False,
        )
    elif not torch.cuda.is_available():
        remedy = f"driver {driver} is here, but torch {torch.__version__} can't use it: install its CUDA build"
        yield Row("CUDA", str(built_for), "wrong", note=remedy)
    else:
        (major, minor), nccl = (
            torch.cuda.get_device_capability(),
            ".".join(map(str, torch.cuda.nccl.version())),
        )
        version = f"{built_for}, driver {driver}, sm_{major}{minor}, NCCL {nccl}"
        if (torch.ones(2, device="cuda") + 1).sum().item() != 4 or major < 8:
            yield Row(
                "CUDA",
                version,
                "wrong",
                note="bf16 and varlen attention need compute capability 8.0 or newer",
            )
        else:
            yield Row("CUDA", version)


def check_tool(name: str, needed_by: str, found: str | None) -> Iterator[Row]:
    """`found`: its path, or None."""
    yield (
        Row(name, "found")
        if found
        else Row(name, "", "missing", note=f"put it on PATH: {needed_by}", required=False)
    )


def check_operators(
    installed: dict[str, bool], compatible: dict[str, bool], built_for: str
) -> Iterator[Row]:
    """`installed`, `compatible`: DeepSpeed's operators by name; `built_for`: the torch that the installed ones were built with."""
    built = [name for name, there in installed.items() if there]
    later = [name for name, possible in compatible.items() if possible and name not in built]
    row = Row(
        "deepspeed operators",
        f"{len(built)} built, {len(later)} at use",
        note=f"built: {built or 'none'}; compiled at first use: {later}",
    )
    if built and built_for != ".".join(torch.__version__.split(".")[:2]):
        row.verdict, row.note = (
            "wrong",
            f"a stale build, made with torch {built_for}: pip install --force-reinstall --no-cache-dir deepspeed",
        )
    yield row


def main() -> Iterator[Row]:
    yield from packages.main()
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = (
        subprocess.run(ask, capture_output=True, text=True, timeout=20)
        if shutil.which("nvidia-smi") and os.environ.get("DS_ACCELERATOR") != "cpu"
        else None
    )
    said = (
        asked.stdout.split() if asked and asked.returncode == 0 else []
    )  # a machine without a GPU may have the command all the same
    yield from guarded("CUDA", check_cuda, said[0] if said else "", torch.version.cuda)
    yield from check_tool(
        "C++ compiler",
        "torch.compile and DeepSpeed's operators",
        shutil.which("g++") or shutil.which("clang++"),
    )
    yield from check_tool(
        "ninja on PATH", "DeepSpeed's operators (pip install ninja)", shutil.which("ninja")
    )
    if "deepspeed" in sys.modules:  # otherwise its own row has said why
        from deepspeed.git_version_info import installed_ops, torch_info

        compatible = sys.modules["deepspeed"].ops.__compatible_ops__
        yield from guarded(
            "deepspeed operators",
            check_operators,
            installed_ops,
            compatible,
            torch_info["version"],
            required=False,
        )


if __name__ == "__main__":
    emit(guarded("environment", main))
