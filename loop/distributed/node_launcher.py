"""DeepSpeed's launcher of one machine's ranks, which leaves signals to the ranks.

A scheduler may signal every process of a job at once. By itself DeepSpeed's launcher would then end
with code 1 however well its ranks end, and kill those that take longer than 30 seconds to save.
`loop.distributed.launcher` signals the ranks, and kills this process where it is to end.
"""

import signal

from deepspeed.launcher import launch

_set_handler = signal.signal


def ignore_signal(number, handler):
    """In place of `signal.signal`. DeepSpeed calls it when the ranks are started."""
    return _set_handler(number, signal.SIG_IGN)


if __name__ == "__main__":
    launch.signal.signal = ignore_signal
    launch.main()
