"""The tables of mutants fit the code and the tests: a renamed line or test is said at once."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

TABLES = sorted(Path(__file__).parent.glob("*.yaml"))
NEEDED, OTHERS = {"file", "was", "now", "tests"}, {"equivalent"}
NOT_QUICK = ("mark.slow", "mark.gpu")  # the runner leaves such tests out


@functools.cache
def quick_tests(file: str) -> set[str]:
    """The names of a file's tests that run by default."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    if any(mark.startswith("pytestmark") and mark.endswith(NOT_QUICK) for mark in marks):
        return set()
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(ast.unparse(mark).endswith(NOT_QUICK) for mark in node.decorator_list)
    }


def fault_of(entry: dict[str, str]) -> str:
    """What is wrong with an entry, or ""."""
    if not NEEDED <= entry.keys() <= NEEDED | OTHERS:
        return f"has {', '.join(entry)}"
    code, was = (ROOT / entry["file"]).read_text(), entry["was"]
    if code.count(was) != 1 or was == entry["now"]:
        return f"{entry['file']} has its text {code.count(was)} times"
    try:
        ast.parse(code.replace(was, entry["now"]))
    except SyntaxError as error:
        return f"is no Python any more: {error}"
    for test in entry["tests"].split():
        file, _, name = test.partition("::")
        known = quick_tests(file)
        if not known or (name and name.partition("[")[0] not in known):
            return f"{test} is no quick test"
    return "" if entry["tests"].split() else "names no test"


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_each_mutant_changes_one_place_and_names_quick_tests(table):
    entries = yaml.safe_load(table.read_text())
    faults = {name: fault_of(entry) for name, entry in entries.items()}
    assert faults and not {name: fault for name, fault in faults.items() if fault}


def test_no_two_mutants_have_one_name():
    names = Counter(
        name
        for table in TABLES
        for name in re.findall(r"^(\w+):$", table.read_text(), re.MULTILINE)
    )
    assert names and max(names.values()) == 1, names.most_common(3)
