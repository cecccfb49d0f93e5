"""The layout of the code: short functions, one thought a line, the formatter nearly always on."""

import ast
import re

import pytest
from helpers import ROOT

SOURCES = sorted(
    path for folder in ("loop", "kernels_check", "tests") for path in (ROOT / folder).rglob("*.py")
)
SCRIPTS = ["launch.sh", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("setup/*.sh"))]
MOST_LINES, MOST_LOCALS, MOST_COLUMNS = 60, 25, 100
# Longer by their nature: the loop itself, and kernels, whose tensors are all arguments and locals.
LONG_FUNCTIONS = {("loop/train.py", "train"): 95}
WITHOUT_LIMITS = {"loop/kernels/triton_kernels.py"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def functions_of(tree: ast.AST) -> list:
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def local_names(function) -> set[str]:
    """What a function binds itself, its arguments included; functions inside it have their own."""
    inner = {id(n) for f in functions_of(function) if f is not function for n in ast.walk(f)}
    names = {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inner:
            names.add(node.id)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_keeps_the_layout(path):
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    tree, wrong = ast.parse(text), []
    for function in functions_of(tree):
        lines = function.end_lineno - function.lineno + 1
        most = LONG_FUNCTIONS.get((name, function.name), MOST_LINES)
        if name not in WITHOUT_LIMITS and lines > most:
            wrong.append(f"{name}:{function.lineno}: {function.name} has {lines} lines")
        if name not in WITHOUT_LIMITS and (name, function.name) not in LONG_FUNCTIONS:
            if len(local_names(function)) > MOST_LOCALS:
                wrong.append(f"{name}:{function.lineno}: {function.name} has many locals")
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            if any(isinstance(n, ast.NamedExpr) for n in ast.walk(node)):
                wrong.append(f"{name}:{node.lineno}: a walrus in a comprehension")
        if isinstance(node, ast.IfExp):
            if any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node):
                wrong.append(f"{name}:{node.lineno}: a conditional expression in another")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_the_width(name):
    """The linter sees to Python alone."""
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if len(line) > MOST_COLUMNS] == []


def test_the_formatter_is_rarely_switched_off():
    switch = re.compile(r"# fmt: (?:skip|off)$", re.M)
    skipped = [path for path in SOURCES for _ in switch.findall(path.read_text())]
    assert len(skipped) <= 20, skipped
