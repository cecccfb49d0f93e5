"""Libraries print only what is wrong, so that the lines of a run stay readable."""

import logging
import os
import warnings

import transformers
from huggingface_hub.utils import disable_progress_bars

from ..distributed.exit import guard_streams


def quiet_libraries(output_is_log: bool = False) -> None:
    """Turns off the libraries' warnings, informational messages and progress bars.

    What ends a command is said by the command, whose lines are written whatever the terminal shows.

    Args:
        output_is_log: as in `guard_streams`.
    """
    guard_streams(output_is_log)
    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "deepspeed", "bitsandbytes", "torch", "datasets", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Its errors are raised as well, and some of its lines show a whole configuration.
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    disable_progress_bars()  # each rank would show them; loop/distributed/progress.py shows one
    # An environment variable, because `datasets` is imported late, where it is needed.
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
