"""One thin `main` for each command of ./launch.sh. Only another command imports a command.

Libraries announce themselves in a dozen warnings while they are imported, and the lines that matter
would drown in them. So importing a command silences them; importing the rest of loop/ does not.
Errors still come through, and what this project has to say it prints. A Ctrl-C is one word.
"""

import logging
import sys
from types import TracebackType

logging.disable(logging.WARNING)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows no traceback for a Ctrl-C, which may come before a command can catch it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
