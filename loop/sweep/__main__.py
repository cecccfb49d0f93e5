"""`./launch.sh sweep`: runs one after another, or one on each GPU, and a table of their results.

Each is an ordinary run, started as `./launch.sh train` starts it. Finished ones are not repeated,
so the same command goes on after a stop; one that fails is said, and the others go on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from .grid import Run, Sweep, plan_sweep
from .inputs import check_inputs
from .results import as_table, read_result, write_results

STOPPED = 130  # as a shell has it after Ctrl-C


class Runner:
    """Runs what a sweep lacks. `failed` are exit codes by the number of the run."""

    def __init__(self, sweep: Sweep, gpus: list[str]) -> None:
        """gpus: their numbers; with two or more, each run has one of them to itself."""
        self.sweep = sweep
        self.slots = gpus if len(gpus) > 1 and not sweep.takes_gpus else [""]
        self.running: dict[str, tuple[int, subprocess.Popen]] = {}  # by slot
        self.failed: dict[int, int] = {}
        self.requests = 0  # to stop
        self.passed_on: dict[int, int] = {}  # how many of them, by the pid of a run
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._count_request)

    def _count_request(self, number, frame) -> None:
        self.requests += 1

    def _pass_on(self, process: subprocess.Popen) -> None:
        """Asks a run to save and end, or to end at once where it was asked before."""
        if self.passed_on.get(process.pid, 0) < self.requests:
            self.passed_on[process.pid] = self.requests
            process.terminate()

    def run(self) -> None:
        """Returns when all have ended, or when those that were running have, after a stop."""
        numbered = enumerate(self.sweep.runs)
        waiting = [(n, run) for n, run in numbered if not read_result(run).finished]
        while self.running or (waiting and not self.requests):
            for slot in self.slots:
                if waiting and slot not in self.running and not self.requests:
                    number, run = waiting.pop(0)
                    self.running[slot] = (number, self._start(number, run, slot))
            for slot, (number, process) in list(self.running.items()):
                code = process.poll()
                if code is None:
                    self._pass_on(process)
                    continue
                del self.running[slot]
                if code and not self.requests:
                    self.failed[number] = code
                    name = self.sweep.runs[number].config.run.name
                    say(f"{name} failed with exit code {code}; the others go on")
            time.sleep(0.1)

    def _start(self, number: int, run: Run, slot: str) -> subprocess.Popen:
        """Starts a run. Side by side, the runs write into files and not over each other.

        The terminal's Ctrl-C is for this process alone, which passes it on: a run that got both
        would take the second, where that comes late, for the wish to end without saving.
        """
        name = run.config.run.name
        where = f" on GPU {slot}, into {self.sweep.folder / name}.log" if slot else ""
        say(f"run {number + 1} of {len(self.sweep.runs)}: {name}{where}")
        command = [sys.executable, "-u", "-m", "loop.distributed.launcher", "train", *run.args]
        if not slot:
            return subprocess.Popen(command, start_new_session=True)
        with (self.sweep.folder / f"{name}.log").open("a") as log:
            env = os.environ | {"CUDA_VISIBLE_DEVICES": slot}
            return subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )


def make_folder(sweep: Sweep) -> None:
    """Makes the folder of the sweep's runs. Raises ConfigError."""
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        sweep.folder.chmod(0o700)  # its runs are of patients' data
    except OSError as error:
        raise ConfigError(
            f"run.dir, run.name: {sweep.folder} cannot be made ({error.strerror})"
        ) from error


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody need read it
        print(f"sweep: {text}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """`[--gpus N] [--hostfile FILE] [--config FILE] key=a,b,... [key=value ...]`"""
    try:
        sweep = plan_sweep(sys.argv[1:] if argv is None else argv)
        make_folder(sweep)
        check_inputs(sweep.runs, say)
    except ConfigError as error:
        exit_with_config_error(error)
    except KeyboardInterrupt:
        say("stopped before the first run")
        sys.exit(STOPPED)
    gpus = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    runner = Runner(sweep, gpus)
    runner.run()
    results = [read_result(run) for run in sweep.runs]
    print(as_table(sweep, results, runner.failed))
    try:
        write_results(sweep, results)
    except OSError as error:  # the table has been shown
        say(f"sweep.json cannot be written ({error.strerror})")
    if runner.requests:
        say("stopped; the same command goes on")
        sys.exit(STOPPED)
    sys.exit(1 if runner.failed else 0)


if __name__ == "__main__":
    main()
