"""Versions against the pins, and whether the packages import. The environment check runs it.

In the field: a range in a requirements file lets a new release change the numbers, and an extension
built for another torch fails as `undefined symbol` (flash-attention#931).
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from kernels_check.rows import Row, guarded

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# Training can't start without these. The other pins are for building and testing.
REQUIRED = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "tqdm",
    "tensorboard",
)


def check_package(
    name: str,
    pin: str,
    version_of: Callable = importlib.metadata.version,
    load: Callable = importlib.import_module,
) -> Iterator[Row]:
    """Whether a package is installed, imports, is what its record tells, and is the pinned version.

    Another version gets a note and stops nothing: the other rows tell what it does. The build tag
    after `+` (cpu, cu130) is not part of a pin.
    """
    try:
        version = version_of(name)
    except importlib.metadata.PackageNotFoundError:
        yield Row(name, "", "missing", note=f"pip install {name}=={pin} (./launch.sh setup)")
        return
    loaded = getattr(load(name.replace("-", "_")), "__version__", version)
    if str(loaded).split("+")[0] != version.split("+")[0]:
        reinstall = f"pip install --force-reinstall --no-cache-dir {name}=={pin}"
        note = f"a stale build: what is imported calls itself {loaded}: {reinstall}"
        yield Row(name, version, "wrong", note=note)
    elif version.split("+")[0] != pin:
        yield Row(name, version, note=f"tested with {pin} (./launch.sh setup installs that)")
    else:
        yield Row(name, version)


def check_native(version: str, library: object) -> Iterator[Row]:
    """bitsandbytes' C library. Where it does not load, an object stands in that fails when used."""
    what = "bitsandbytes library"
    if "ErrorHandler" in type(library).__name__:
        note = "it did not load: see `python -m bitsandbytes`; reinstall for this CUDA"
        yield Row(what, version, "wrong", note=note)
    else:
        yield Row(what, version)


def pins(text: str) -> dict[str, str]:
    """Name and version of each `name==version` line whose marker holds for this Python."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def main(load: Callable = importlib.import_module) -> Iterator[Row]:
    for name, pin in pins(CONSTRAINTS.read_text()).items():
        yield from guarded(name, check_package, name, pin, load=load, required=name in REQUIRED)
    bnb = sys.modules.get("bitsandbytes")
    if bnb:  # otherwise its own row tells why
        library = bnb.cextension.lib
        yield from guarded("bitsandbytes library", check_native, bnb.__version__, library)
