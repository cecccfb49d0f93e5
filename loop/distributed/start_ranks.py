"""The parent of a machine's ranks: `python -m loop.distributed.start_ranks JSON MODULE [ARG ...]`.

It does what `deepspeed.launcher.launch` does, and imports no library: that one needs all of torch
and DeepSpeed, seconds before the first rank starts. JSON has the keys `hosts` ({name: its GPUs or
slots}), `node` (which of them this is), `address` and `port` (where the ranks meet).
"""

import json
import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

POLL_SECONDS = 0.1
GRACE_SECONDS = 30  # between SIGTERM and SIGKILL, where a rank ended badly


def rank_environments(spec: dict) -> list[dict[str, str]]:
    """What each rank of this machine finds in its environment, beside all that is there."""
    hosts = list(spec["hosts"].values())
    slots = hosts[spec["node"]]
    first = sum(map(len, hosts[: spec["node"]]))  # rank of this machine
    shared = {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, slots)),
        "MASTER_ADDR": spec["address"],
        "MASTER_PORT": str(spec["port"]),
        "WORLD_SIZE": str(sum(map(len, hosts))),
        "LOCAL_SIZE": str(len(slots)),
        "CROSS_RANK": str(spec["node"]),  # DeepSpeed's names for a machine and their number
        "CROSS_SIZE": str(len(hosts)),
    }
    return [
        shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)}
        for local in range(len(slots))
    ]


class RankProcesses:
    """The ranks of this machine. When one ends badly, all end.

    SIGTERM goes to each of them, and how they end decides how this process ends: a scheduler may
    signal every process of a run at once, and the ranks save then.
    """

    def __init__(self) -> None:
        self.running: list[subprocess.Popen] = []
        self.stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        self.stop = True

    def start(self, command: list[str], environments: list[dict[str, str]]) -> None:
        for environment in environments:
            self.running.append(subprocess.Popen(command, env=os.environ | environment))

    def wait(self) -> None:
        """Returns when all have ended well; ends this process when one has not."""
        while self.running:
            if self.stop:
                self.stop = False
                for process in self.running:
                    process.terminate()
            for process in list(self.running):
                if process.poll():
                    self.end(process.returncode % 256)  # of signal N: 256 - N
                if process.returncode == 0:
                    self.running.remove(process)
            time.sleep(POLL_SECONDS)

    def end(self, code: int) -> NoReturn:
        """Ends the ranks, by SIGTERM and after a grace time by SIGKILL; then this process."""
        for process in self.running:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        sys.exit(code)


def main() -> None:
    spec, *command = sys.argv[1:]
    ranks = RankProcesses()
    ranks.start([sys.executable, "-u", "-m", *command], rank_environments(json.loads(spec)))
    ranks.wait()


if __name__ == "__main__":
    main()
