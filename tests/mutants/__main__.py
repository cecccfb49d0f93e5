"""`./launch.sh test --mutants [NAME ...]`: would the tests notice a slip?

Each entry of the tables beside this file is a small change of the code as a real slip would make
it, and the tests that belong to that code. The change is made in a copy of the checkout, the tests
run there, and a mutant that none of them notices has survived. NAME: a part of names or of the
files that are changed. The exit code is 1 where a mutant survived that no table calls equivalent,
or where the tests fail without any change.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from fork_server import CPU, start_server  # noqa: E402

WORKERS = 2
LONGEST_SECONDS = 1800  # a mutant that makes a test wait for ever is noticed, too
PASSED, FAILED = 0, 1  # pytest's exit codes


class Mutant(NamedTuple):
    name: str
    file: str  # the file that is changed
    was: str  # text that occurs once in it
    now: str
    tests: list[str]  # files, or FILE::TEST
    equivalent: str = ""  # why nothing can notice it


class Outcome(NamedTuple):
    verdict: str  # noticed, survived, equivalent or broken
    seconds: float
    words: str = ""  # what pytest said last, where it is of interest


def read_tables(names: list[str]) -> list[Mutant]:
    """The mutants whose name or file has one of these parts; all of them for no names."""
    mutants = []
    for path in sorted(HERE.glob("*.yaml")):
        for name, entry in yaml.safe_load(path.read_text()).items():
            tests = [f"tests/{test}" for test in entry.pop("tests").split()]
            mutants.append(Mutant(name, tests=tests, **entry))
    if len({m.name for m in mutants}) < len(mutants):
        raise SystemExit("error: two mutants have one name")
    return [m for m in mutants if not names or any(n in m.name or n in m.file for n in names)]


def copy_checkout(folder: Path) -> Path:
    """A copy of the tracked and new files of the checkout."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(checkout: Path, python: str, tests: list[str]) -> tuple[int | None, str]:
    """(pytest's exit code, None where it did not end; its last lines)."""
    command = [python, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            [*command, f"--basetemp={checkout}.tmp"],
            cwd=checkout,
            env=os.environ | CPU | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, "no end"
    return done.returncode, done.stdout[-600:] + done.stderr[-300:]


def try_mutant(mutant: Mutant, checkout: Path, python: str) -> Outcome:
    """Makes the change, runs the tests, and takes the change back."""
    started, path = time.monotonic(), checkout / mutant.file
    text = path.read_text()
    if text.count(mutant.was) != 1 or mutant.was == mutant.now:
        return Outcome("broken", 0.0, f"{mutant.file} has its text {text.count(mutant.was)} times")
    path.write_text(text.replace(mutant.was, mutant.now))
    try:
        code, words = run_tests(checkout, python, mutant.tests)
    finally:
        path.write_text(text)
    seconds = time.monotonic() - started
    if code in (FAILED, None):
        return Outcome("noticed", seconds)
    if code == PASSED:
        return Outcome("equivalent" if mutant.equivalent else "survived", seconds)
    return Outcome("broken", seconds, words)


def try_all(mutants: list[Mutant], python: str, folder: Path) -> dict[str, Outcome]:
    """The outcomes of mutants, some at a time, each worker in a copy of its own."""
    todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    outcomes: dict[str, Outcome] = {}
    for mutant in mutants:
        todo.put(mutant)

    def work(number: int) -> None:
        checkout = copy_checkout(folder / f"checkout-{number}")
        while not todo.empty():
            mutant = todo.get()
            outcomes[mutant.name] = outcome = try_mutant(mutant, checkout, python)
            print(f"{outcome.verdict:10} {mutant.name} ({outcome.seconds:.0f} s)", flush=True)
            if outcome.words:
                print(outcome.words, flush=True)

    workers = [threading.Thread(target=work, args=[i], daemon=True) for i in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return outcomes


def main(names: list[str]) -> int:
    mutants = read_tables(names)
    if not mutants:
        raise SystemExit(f"error: no mutant has {' or '.join(names)} in its name or file")
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="soap-tests-")
    python = os.environ["LOOP_TESTS_PYTHON"] = start_server()
    with tempfile.TemporaryDirectory(prefix="soap-mutants-") as folder:
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        code, words = run_tests(copy_checkout(Path(folder) / "unchanged"), python, tests)
        if code != PASSED:
            print(f"error: without any change the tests end with {code}:\n{words}")
            return 1
        outcomes = try_all(mutants, python, Path(folder))
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    print(
        f"{len(mutants)} mutants: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    )
    return int("survived" in counts or "broken" in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
