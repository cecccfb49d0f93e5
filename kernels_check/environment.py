"""CUDA, compilers and DeepSpeed's own operators; `packages.py` adds the versions.

In the field: a CPU build of torch on a GPU machine trains at a thousandth of the speed and nothing
tells. DeepSpeed compiles an operator at its first use, in the middle of a run, and dies where no
compiler or ninja is on PATH.
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


def driver_version() -> str:
    """The version of the NVIDIA driver; "" without a GPU, or where GPUs are not to be used."""
    if not shutil.which("nvidia-smi") or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    # A machine without a GPU may have the command all the same.
    versions = done.stdout.split() if done.returncode == 0 else []
    return versions[0] if versions else ""


def check_cuda(driver: str, built_for: str | None) -> Iterator[Row]:
    """`driver`: its version, "" without a GPU; `built_for`: torch.version.cuda."""
    if not driver:
        note = "no NVIDIA driver here: rows that need a GPU are not required"
        yield Row("CUDA", "", "missing", note=note, required=False)
        return
    if not torch.cuda.is_available():
        note = (
            f"driver {driver} is here, but torch {torch.__version__} can't use it:"
            " install its CUDA build"
        )
        yield Row("CUDA", str(built_for), "wrong", note=note)
        return
    major, minor = torch.cuda.get_device_capability()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    version = f"{built_for}, driver {driver}, sm_{major}{minor}, NCCL {nccl}"
    if (torch.ones(2, device="cuda") + 1).sum().item() != 4 or major < 8:
        note = "bf16 and varlen attention need compute capability 8.0 or newer"
        yield Row("CUDA", version, "wrong", note=note)
    else:
        yield Row("CUDA", version)


def check_tool(name: str, needed_by: str, path: str | None) -> Iterator[Row]:
    """`path`: where the tool is, or None."""
    if path:
        yield Row(name, "found")
    else:
        yield Row(name, "", "missing", note=f"put it on PATH: {needed_by}", required=False)


def check_operators(
    installed: dict[str, bool], compatible: dict[str, bool], built_for: str
) -> Iterator[Row]:
    """Whether DeepSpeed's prebuilt operators fit this torch.

    `installed`, `compatible`: its operators by name; `built_for`: the torch that the installed ones
    were built with.
    """
    built = [name for name, is_there in installed.items() if is_there]
    later = [name for name, can_be in compatible.items() if can_be and name not in built]
    version = f"{len(built)} built, {len(later)} at use"
    if built and built_for != ".".join(torch.__version__.split(".")[:2]):
        reinstall = "pip install --force-reinstall --no-cache-dir deepspeed"
        note = f"a stale build, made with torch {built_for}: {reinstall}"
        yield Row("deepspeed operators", version, "wrong", note=note)
    else:
        note = f"built: {built or 'none'}; compiled at first use: {later}"
        yield Row("deepspeed operators", version, note=note)


def main() -> Iterator[Row]:
    yield from packages.main()
    yield from guarded("CUDA", check_cuda, driver_version(), torch.version.cuda)
    compiler = shutil.which("g++") or shutil.which("clang++")
    yield from check_tool("C++ compiler", "torch.compile and DeepSpeed's operators", compiler)
    needed_by = "DeepSpeed's operators (pip install ninja)"
    yield from check_tool("ninja on PATH", needed_by, shutil.which("ninja"))
    if "deepspeed" in sys.modules:  # otherwise its own row tells why
        from deepspeed.git_version_info import installed_ops, torch_info

        yield from guarded(
            "deepspeed operators",
            check_operators,
            installed_ops,
            sys.modules["deepspeed"].ops.__compatible_ops__,
            torch_info["version"],
            required=False,
        )


if __name__ == "__main__":
    emit(guarded("environment", main))
