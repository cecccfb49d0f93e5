"""`./launch.sh test --mutants [NAME ...] [options]`: would the tests notice a slip?

Each entry of the tables beside this file is a small change of the code as a real slip would make
it, and the tests that belong to that code. The change is made in a copy of the checkout, the tests
run there, and a mutant that none of them notices has survived. NAME: a part of names or of the
files that are changed. The exit code is 1 where a mutant survived that no table calls equivalent,
where one was not run, or where a test fails without any change.
"""

import argparse
import compileall
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

import psutil
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from fork_server import CPU, start_server  # noqa: E402

PASSED, FAILED, NO_TEST_LEFT = 0, 1, 5  # pytest's exit codes
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # the file that is changed
    was: str  # text that occurs once in it
    now: str
    tests: tuple[str, ...]  # files, or FILE::TEST
    equivalent: str = ""  # why nothing can notice it


@dataclass(frozen=True)
class Outcome:
    verdict: str  # noticed, survived, equivalent, broken or not run
    seconds: float = 0.0
    words: str = ""  # what pytest said last, where it is of interest


@dataclass(frozen=True)
class Unchanged:
    """How tests end without a mutant: how long they take, and which of them fail anyway."""

    seconds: float
    failed: tuple[str, ...]
    words: str = ""


def read_tables(names: list[str]) -> list[Mutant]:
    """The mutants whose name or file has one of these parts; all of them for no names."""
    mutants = []
    for path in sorted(HERE.glob("*.yaml")):
        for name, entry in yaml.safe_load(path.read_text()).items():
            tests = tuple(f"tests/{test}" for test in entry.pop("tests").split())
            mutants.append(Mutant(name, tests=tests, **entry))
    if len({m.name for m in mutants}) < len(mutants):
        raise SystemExit("error: two mutants have one name")
    return [m for m in mutants if not names or any(n in m.name or n in m.file for n in names)]


def files_of_the_checkout() -> list[str]:
    """The tracked and the new ones."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


class Runner:
    """Runs pytest in copies of the checkout, one copy a worker."""

    def __init__(self, python: str, folder: Path, limit: float, within: float) -> None:
        self.python, self.folder, self.limit = python, folder, limit
        self.ends = time.monotonic() + within
        self.files = files_of_the_checkout()
        self.unchanged = folder / "unchanged"
        for name in self.files:
            (self.unchanged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.unchanged / name)
        for package in ("loop", "kernels_check"):  # only a changed file is compiled again
            by_hash = PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(self.unchanged / package, quiet=2, invalidation_mode=by_hash)

    def copy_checkout(self, number: int) -> Path:
        return shutil.copytree(self.unchanged, self.folder / f"checkout-{number}")

    def run_tests(self, checkout: Path, *args: str) -> tuple[int | None, str]:
        """(pytest's exit code, None where it took too long; its last lines)."""
        command = [self.python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *args]
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(checkout), *(path for path in inherited if path not in ("", str(ROOT)))]
        try:
            done = subprocess.run(
                [*command, "-rfE", f"--basetemp={checkout}.tmp"],
                cwd=checkout,
                env=os.environ | CPU | {"PYTHONPATH": os.pathsep.join(paths)},
                capture_output=True,
                text=True,
                timeout=min(self.limit, max(self.ends - time.monotonic(), 1)),
            )
        except subprocess.TimeoutExpired:
            end_processes_in(checkout)
            return None, "no end"
        return done.returncode, done.stdout[-2000:] + done.stderr[-300:]

    def try_unchanged(self, checkout: Path, tests: tuple[str, ...]) -> Unchanged:
        started = time.monotonic()
        code, words = self.run_tests(checkout, *tests)
        seconds = time.monotonic() - started
        failed = tuple(FAILED_TEST.findall(words)) if code == FAILED else ()
        return Unchanged(seconds, failed, "" if code == PASSED or failed else f"{code}: {words}")

    def try_mutant(self, mutant: Mutant, checkout: Path, unchanged: Unchanged) -> Outcome:
        """Makes the change, runs the tests that pass without it, and takes the change back."""
        started, path = time.monotonic(), checkout / mutant.file
        if unchanged.words:
            return Outcome("not run", words=f"without the change: {unchanged.words}")
        if started > self.ends:
            return Outcome("not run")
        text = path.read_text()
        if text.count(mutant.was) != 1 or mutant.was == mutant.now:
            words = f"{mutant.file} has its text {text.count(mutant.was)} times"
            return Outcome("broken", words=words)
        left_out = [f"--deselect={test}" for test in unchanged.failed]
        path.write_text(text.replace(mutant.was, mutant.now))
        try:
            code, words = self.run_tests(checkout, "-x", *left_out, *mutant.tests)
        finally:
            path.write_text(text)
        return Outcome(*verdict_of(mutant, code, words, time.monotonic() - started))


def verdict_of(mutant: Mutant, code: int | None, words: str, seconds: float) -> tuple:
    """The fields of an Outcome."""
    if code == FAILED:
        return "noticed", seconds
    if code == PASSED:
        return ("equivalent" if mutant.equivalent else "survived"), seconds
    return ("not run" if code in (None, NO_TEST_LEFT) else "broken"), seconds, words


def end_processes_in(folder: Path) -> None:
    """Ranks go on where the test that started them was killed; they stand in its checkout."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                process.kill()


class Log:
    """Outcomes as they come, a JSON line each. What it has of this very code is not run again."""

    def __init__(self, path: Path | None, files: list[str]) -> None:
        self.path, self.lock = path, threading.Lock()
        code = hashlib.sha256()
        for name in files:
            code.update(f"{name}\0".encode() + (ROOT / name).read_bytes())
        self.code = code.hexdigest()[:16]
        self.outcomes: dict[str, Outcome] = {}
        lines = path.read_text().splitlines() if path and path.exists() else []
        for line in map(json.loads, lines):
            if line.pop("code") == self.code and line["verdict"] != "not run":
                self.outcomes[line.pop("name")] = Outcome(**line)

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes[mutant.name] = outcome
            print(f"{outcome.verdict:10} {mutant.name} ({outcome.seconds:.0f} s)", flush=True)
            if outcome.words:
                print(outcome.words, flush=True)
            if self.path:
                line = {"code": self.code, "name": mutant.name} | asdict(outcome)
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def try_all(mutants: list[Mutant], runner: Runner, log: Log, workers: int) -> set[str]:
    """Logs the outcome of each; returns the tests that fail without any change.

    All tests run once unchanged. A mutant waits for its own to end, and those of the fastest tests
    come first.
    """
    todo: queue.PriorityQueue = queue.PriorityQueue()
    of_tests: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants:
        of_tests.setdefault(mutant.tests, []).append(mutant)
    unchanged: dict[tuple[str, ...], Unchanged] = {}
    for tests in of_tests:
        todo.put((0.0, str(tests), tests))

    def work(number: int) -> None:
        checkout = runner.copy_checkout(number)
        while True:
            _, _, task = todo.get()
            if task is None:
                return
            if isinstance(task, Mutant):
                log.add(task, runner.try_mutant(task, checkout, unchanged[task.tests]))
            else:
                unchanged[task] = before = runner.try_unchanged(checkout, task)
                for mutant in of_tests[task]:
                    todo.put((before.seconds, mutant.name, mutant))
            todo.task_done()

    threads = [threading.Thread(target=work, args=[i], daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    todo.join()
    for thread in threads:
        todo.put((0.0, "", None))
    for thread in threads:
        thread.join()
    return {test for before in unchanged.values() for test in before.failed}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./launch.sh test --mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a mutant")
    parser.add_argument("--within", type=float, default=1e9, help="seconds of all of them")
    parser.add_argument("--log", type=Path, help="a file for the outcomes, as JSON lines")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    mutants = read_tables(options.names)
    if not mutants:
        raise SystemExit(f"error: no mutant has {' or '.join(options.names)} in its name or file")
    os.environ |= CPU | {"PYTHONDONTWRITEBYTECODE": "1"}  # before the server: forks have its own
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="soap-tests-")
    python = os.environ["LOOP_TESTS_PYTHON"] = start_server()
    with tempfile.TemporaryDirectory(prefix="soap-mutants-") as folder:
        runner = Runner(python, Path(folder), options.limit, options.within)
        log = Log(options.log, runner.files)
        todo = [mutant for mutant in mutants if mutant.name not in log.outcomes]
        failed = try_all(todo, runner, log, options.workers)
    for test in sorted(failed):
        print(f"error: fails without any change, and was left out: {test}")
    counts = Counter(log.outcomes[mutant.name].verdict for mutant in mutants)
    print(
        f"{len(mutants)} mutants: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    )
    return int(bool(failed or counts.keys() & {"survived", "broken", "not run"}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
