"""One thin `main` for each command of ./launch.sh. Only another command imports a command.

Libraries announce themselves in a dozen warnings while they are imported, and the lines that matter
would drown in them. So importing a command silences them; importing the rest of loop/ does not.
Errors still come through, and what this project has to say it prints. A Ctrl-C is one word, and a
standard output that is full is one line.
"""

import contextlib
import logging
import os
import sys
import traceback
from types import TracebackType

from ..config.error_text import first_line
from ..distributed.exit import OutputLost, exit_with_config_error

# How the names begin of the variables that libraries read while they are imported.
OF_LIBRARIES = ("CUDA_", "DS_", "HF_", "OMP_", "PYTORCH_", "TORCH", "TRANSFORMERS_")

logging.disable(logging.WARNING)


def _wrong_variables(error: Exception, trace: TracebackType | None) -> str:
    """The variables that may have kept a library from being imported; "" where that is not it."""
    code = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    importing = any(at.co_name == "<module>" and "site-packages" in at.co_filename for at in code)
    if not importing or not isinstance(error, (ValueError, RuntimeError)):
        return ""
    names = sorted(name for name in os.environ if name.startswith(OF_LIBRARIES))
    named = [name for name in names if name in str(error)]
    return ", ".join(named or names)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows no traceback for a Ctrl-C, which may come before a command can catch it.

    Nor for a full standard output, which may be met wherever a command prints, nor for a library
    that can't be imported as a variable has a wrong value."""
    if issubclass(kind, KeyboardInterrupt):
        _tell("interrupted")
    elif isinstance(error, Exception) and (names := _wrong_variables(error, trace)):
        reason = f"{names}: a library can't be imported with that ({first_line(error)})"
        try:
            exit_with_config_error(ValueError(f"{reason}; correct it, or unset it"))
        except SystemExit:  # which Python would report as a mistake of this hook
            os._exit(2)
    elif issubclass(kind, OutputLost):
        _tell(f"error: standard output: {error}")
    else:
        sys.__excepthook__(kind, error, trace)


def _tell(line: str) -> None:
    """Writes a line past torch, which puts "[rank0]: " before all that a hook says on stderr."""
    with contextlib.suppress(OSError, ValueError):  # nobody need read it
        print(line, file=sys.__stderr__, flush=True)


sys.excepthook = _report
