"""CUDA, compilers and DeepSpeed's own operators; `packages.py` adds the versions.

In the field: a CPU build of torch on a GPU machine trains at a thousandth of the speed and nothing
tells. DeepSpeed compiles an operator at its first use, in the middle of a run, and dies where no
compiler or ninja is on PATH.
"""

import shutil
import sys
from collections.abc import Iterator

import torch

from kernels_check import packages
from kernels_check.rows import Row, guarded
from kernels_check.table import emit
from loop.config.device import Card, asked_for_cpu, card_refusal, find_card, why_unusable


def check_cuda(card: Card | None, built_for: str | None) -> Iterator[Row]:
    """`card`: None without a GPU, or where GPUs are not to be used; `built_for`: of torch."""
    if not card:
        note = "no NVIDIA driver here: rows that need a GPU are not required"
        yield Row("CUDA", "", "missing", note=note, required=False)
        return
    if not torch.cuda.is_available():
        yield Row("CUDA", str(built_for), "wrong", note=f"{card}: {why_unusable(card)}")
        return
    major, minor = torch.cuda.get_device_capability()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    version = f"{built_for}, driver {card.driver}, sm_{major}{minor}, NCCL {nccl}"
    if refusal := card_refusal():
        yield Row("CUDA", version, "wrong", note=refusal)
    elif (torch.ones(2, device="cuda") + 1).sum().item() != 4:
        yield Row("CUDA", version, "wrong", note="it can't add")
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
    card = None if asked_for_cpu() else find_card()
    yield from guarded("CUDA", check_cuda, card, torch.version.cuda)
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
