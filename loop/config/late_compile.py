"""bitsandbytes and DeepSpeed, imported without torch's compiler.

What: while they are imported, `torch.compile` of a function returns one that compiles when it is
called.
Why: bitsandbytes compiles stand-ins for machines without its own kernels as it is imported, and
DeepSpeed a part of the Muon optimizer as an engine is made. Either loads torch's whole compiler, a
fifth of a run's imports on a CPU, and no run calls these functions.
Seen: bitsandbytes 0.50.2, DeepSpeed 0.19.8.

To be imported before whatever imports bitsandbytes; later it does nothing for that.
"""

import contextlib
import functools
import importlib
from unittest import mock

import torch

COMPILING = ("bitsandbytes", "deepspeed.runtime.zero.muon.original_muon")


def compile_late(function=None, **options):
    """As torch.compile of a function; the compiler is loaded at the first call."""
    if function is None:
        return functools.partial(compile_late, **options)
    make = functools.cache(lambda: _compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: make()(*args, **kwargs))


_compile = torch.compile
with mock.patch.object(torch, "compile", compile_late):
    for name in COMPILING:
        with contextlib.suppress(ImportError):  # of another version; who needs it says so
            importlib.import_module(name)
