"""A run's imports, and its engine, load no compiler; what would have been compiled still can be."""

import os
import subprocess
import sys

from helpers import ROOT

from loop.config.late_compile import COMPILING, compile_late

LOADED = """
import sys
import loop.commands.{command}
import deepspeed.runtime.zero.muon.muon_optimizer  # what an engine imports as it is made
import torch
print([name for name in {names} if name in sys.modules])
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
"""


def loaded_by(command: str) -> list[str]:
    code = LOADED.format(command=command, names=list(COMPILING))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    return done.stdout.splitlines()[-2:]


def test_a_run_loads_no_compiler():
    """Both libraries are there, torch.compile is torch's own again, and nothing was compiled."""
    for command in ("train", "evaluate"):
        assert loaded_by(command) == [str(list(COMPILING)), "False torch"]


def test_a_function_is_compiled_when_it_is_called(monkeypatch):
    calls = []

    def compile_now(function, **options):
        calls.append(options)
        return lambda x: function(x) + 100

    monkeypatch.setattr("loop.config.late_compile._compile", compile_now)

    @compile_late(dynamic=False)
    def double(x):
        """Twice x."""
        return 2 * x

    assert not calls and double.__doc__ == "Twice x."
    assert (double(1), double(2)) == (102, 104) and calls == [{"dynamic": False}]
