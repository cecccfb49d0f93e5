"""Whether a run computes on NVIDIA GPUs; a GPU that is here and can't be used is a mistake.

Without this a driver that is too old, or torch's build for CPUs, would end in a run on the CPU: a
thousandth of the speed, of another configuration, and exit code 0. torch is imported late, as the
launcher does without it.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .error_text import first_line
from .schema import ConfigError

# The oldest driver for a CUDA version (NVIDIA, "CUDA Toolkit Release Notes", minor version
# compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
LEAST_CAPABILITY = (8, 0)  # for bf16 and varlen attention: Ampere
NVIDIA = "0x10de"  # as the PCI bus has it
CPU_BY_NAME = "or compute on the CPU: DS_ACCELERATOR=cpu ./launch.sh ..."
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and Arm


def user_cache() -> Path:
    """The user's folder of caches; where the user has no home, as in a container, a new one."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return _new_cache()


@functools.cache
def _new_cache() -> Path:
    return Path(tempfile.mkdtemp(prefix="soap-loop-"))


class Card(NamedTuple):
    """The first NVIDIA card of this machine, as the driver's own tool tells."""

    name: str
    driver: str  # its version, "" where unknown
    cuda: str  # the newest CUDA that the driver can do, "" where unknown

    def __str__(self) -> str:
        cuda = f", CUDA {self.cuda} at most" if self.cuda else ""
        return f"{self.name} (driver {self.driver or 'unknown'}{cuda})"


def uses_gpu() -> bool:
    """True where torch computes on NVIDIA GPUs, False where there is none.

    False as well where the CPU was asked for by name: by DS_ACCELERATOR=cpu, or by an empty
    CUDA_VISIBLE_DEVICES. Raises ConfigError for a GPU that is here and that torch can't use, or
    that has no bf16, and where DS_ACCELERATOR names a device that is not here.
    """
    import torch

    if asked_for_cpu():
        return False
    if torch.cuda.is_available():
        if reason := card_refusal():
            raise ConfigError(reason)
        return True
    card = find_card()
    if card:
        raise ConfigError(f"{card} can't be used: {why_unusable(card)}; {CPU_BY_NAME}")
    if named := os.environ.get("DS_ACCELERATOR"):
        raise ConfigError(f"DS_ACCELERATOR={named}: there is no such device; leave it out")
    return False


def has_fast_bf16() -> bool:
    """True where products of matrices take no longer in bf16 than in fp32.

    GPUs that this loop takes are so, and CPUs with instructions for it. Other CPUs convert each
    number: an AVX2 CPU (AMD EPYC 7003, torch 2.13) took 8 times as long as in fp32. Raises
    ConfigError as `uses_gpu` does.
    """
    import torch

    if uses_gpu():
        return True
    # torch below 2.12 may not tell: then fp32, which is right everywhere
    instructions: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return any(instructions.get(name) for name in BF16_INSTRUCTIONS)


def asked_for_cpu() -> bool:
    """True where the environment names the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    return os.environ.get("DS_ACCELERATOR") == "cpu" or visible in ("", "-1")


def card_refusal() -> str | None:
    """Why one of the visible GPUs can't train here; None where all can."""
    import torch

    built_for = torch.cuda.get_arch_list()
    for number in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(number)
        version = f"{capability[0]}.{capability[1]}"
        card = f"GPU {number}, {torch.cuda.get_device_name(number)} (compute capability {version})"
        if capability < LEAST_CAPABILITY:
            return (
                f"{card} has no bf16, in which this loop computes on GPUs, and fp16 is not "
                "supported (it corrupts packed NF4 weights): take a card of compute capability "
                f"8.0 or newer, leave this one out with CUDA_VISIBLE_DEVICES, {CPU_BY_NAME}"
            )
        if not runs_on(capability, built_for):
            return (
                f"{card} is newer than torch {torch.__version__}, CUDA {torch.version.cuda}, which "
                f"is built for {' '.join(built_for)}: install a newer torch, {CPU_BY_NAME}"
            )
    return None


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for one of these architectures runs on a card.

    built_for: e.g. ["sm_80", "sm_90", "compute_90"]. Code for sm_XY runs on the same X with the
    same or a higher Y; compute_XY is compiled at run time for anything newer. An empty list, as of
    builds that don't tell, is no reason to refuse.
    """
    major, minor = capability
    for name in built_for:
        kind, _, digits = name.partition("_")
        number = re.match(r"\d+", digits)
        if not number:
            return True
        its_major, its_minor = divmod(int(number[0]), 10)
        if kind == "compute" and (its_major, its_minor) <= capability:
            return True
        if its_major == major and its_minor <= minor:
            return True
    return not built_for


def why_unusable(card: Card) -> str:
    """Why torch sees no GPU, and the remedy."""
    import torch

    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return (
            f"{build} is the build for CPUs: remove .venv and set it up here anew, which takes the "
            "CUDA build"
        )
    if not card.driver:
        return "its driver does not answer: install it anew, or restart the machine"
    least = OLDEST_DRIVER.get(int(torch.version.cuda.split(".")[0]))
    if least and int(card.driver.split(".")[0]) < least:
        return (
            f"the driver is too old for {build}, CUDA {torch.version.cuda}, which needs driver "
            f"{least} or newer: update the driver, or install torch's build for an older CUDA "
            "(LOOP_TORCH_INDEX in ./launch.sh help)"
        )
    try:
        torch.cuda.init()
        reason = "torch sees no GPU"
    except Exception as error:  # RuntimeError, AssertionError, torch's own DeferredCudaCallError
        reason = first_line(error).rstrip(" .:")
    return (
        f"{build}, CUDA {torch.version.cuda}, says: {reason}. Look at CUDA_VISIBLE_DEVICES, at who "
        "may open the device, and at the driver"
    )


def find_card() -> Card | None:
    """The first NVIDIA card, by the driver's nvidia-smi; None where there is none.

    A driver that does not answer counts where the PCI bus holds a card.
    """
    if not shutil.which("nvidia-smi"):
        return None
    listed = _nvidia_smi("-L")
    found = re.search(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed, re.M)
    if not found:
        failed = not listed and any(_pci_vendors())
        return Card("an NVIDIA card", "", "") if failed else None
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    header = _nvidia_smi()
    version = re.search(r"^\d+[.\d]*$", driver, re.M) or re.search(
        r"(?<=Driver Version: )[\d.]+", header
    )
    cuda = re.search(r"(?<=CUDA Version: )[\d.]+", header)
    return Card(found[1], version[0] if version else "", cuda[0] if cuda else "")


def _nvidia_smi(*options: str) -> str:
    """What it prints; "" where it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _pci_vendors() -> list[Path]:
    """The PCI devices of NVIDIA."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return [path for path in vendors if path.read_text().strip() == NVIDIA]
