"""bitsandbytes, imported in half the time.

What: while it is imported, `torch.compile` of a function returns one that compiles when it is
called.
Why: bitsandbytes compiles stand-ins for machines without its own kernels as it is imported. That
alone loads torch's whole compiler, a fifth of a run's imports, and no run calls them.
Seen: bitsandbytes 0.50.2.

To be imported before whatever imports bitsandbytes; later it does nothing.
"""

import functools
from unittest import mock

import torch


def compile_late(function=None, **options):
    """As torch.compile of a function; the compiler is loaded at the first call."""
    if function is None:
        return functools.partial(compile_late, **options)
    make = functools.cache(lambda: _compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: make()(*args, **kwargs))


_compile = torch.compile
with mock.patch.object(torch, "compile", compile_late):
    import bitsandbytes  # noqa: F401
