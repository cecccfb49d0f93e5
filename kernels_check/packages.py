"""Versions against the pins, and whether the packages import. Run by the environment check.

In the field: a range in a requirements file lets a new release change the numbers; an extension built for another torch fails
as `undefined symbol` (flash-attention#931).
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from kernels_check.rows import Row, guarded

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# The other pins build and test; training starts without them.
TRAINS = (
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
    """Installed, imports, is what its record says, and the pinned version. Another version is remarked on and stops nothing:
    the other rows tell what it does. The build tag after `+` (cpu, cu130) is not part of a pin."""
    try:
        version = version_of(name)
    except importlib.metadata.PackageNotFoundError:
        yield Row(name, "", "missing", note=f"pip install {name}=={pin} (./launch.sh setup)")
        return
    loaded = getattr(load(name.replace("-", "_")), "__version__", version)
    if str(loaded).split("+")[0] != version.split("+")[0]:
        remedy = f"pip install --force-reinstall --no-cache-dir {name}=={pin}"
        yield Row(
            name,
            version,
            "wrong",
            note=f"a stale build: what is imported calls itself {loaded}: {remedy}",
        )
    elif version.split("+")[0] != pin:
        yield Row(name, version, note=f"tested with {pin} (./launch.sh setup installs that)")
    else:
        yield Row(name, version)


def check_native(version: str, library: object) -> Iterator[Row]:
    """bitsandbytes' C library: where it does not load, the package puts an object in its place that fails at first use."""
    if "ErrorHandler" in type(library).__name__:
        yield Row(
            "bitsandbytes library",
            version,
            "wrong",
            note="it did not load: see `python -m bitsandbytes`; reinstall for this CUDA",
        )
    else:
        yield Row("bitsandbytes library", version)


def pins(text: str) -> dict[str, str]:
    """Name and version of each `name==version` line whose marker holds for this Python."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    wanted = [Requirement(line) for line in lines if line]
    return {
        r.name: str(r.specifier).removeprefix("==")
        for r in wanted
        if r.marker is None or r.marker.evaluate()
    }


def main(load: Callable = importlib.import_module) -> Iterator[Row]:
    for name, pin in pins(CONSTRAINTS.read_text()).items():
        yield from guarded(name, check_package, name, pin, load=load, required=name in TRAINS)
    if bnb := sys.modules.get("bitsandbytes"):  # otherwise its own row has said why
        yield from guarded(
            "bitsandbytes library", check_native, bnb.__version__, bnb.cextension.lib
        )
