"""loop/zero3 is the only home of DeepSpeed's internals."""

import ast

import pytest
from helpers import ROOT

# Files outside that may name one, and which.
ALLOWED = {
    "loop/config/deepspeed.py": {  # its own check of what a person writes
        "deepspeed.runtime.config.DeepSpeedConfig",
        "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
        "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    },
    "loop/distributed/world.py": {"deepspeed.ops.__compatible_ops__"},
}
SOURCES = sorted(
    path for path in (ROOT / "loop").rglob("*.py") if path.relative_to(ROOT).parts[1] != "zero3"
)


def imported_names(tree: ast.AST) -> dict[str, str]:
    """{local name: dotted name} of what a file imports from DeepSpeed."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                found[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {local: name for local, name in found.items() if name.split(".")[0] == "deepspeed"}


def imported_modules(tree: ast.AST) -> set[str]:
    """Dotted names of all that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute, "" where it is not of names alone."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def internals(source: str) -> set[str]:
    """The dotted names of DeepSpeed's internals that a file uses."""
    tree = ast.parse(source)
    names = imported_names(tree)
    used = set(imported_modules(tree))
    for node in ast.walk(tree):
        local, _, rest = dotted(node).partition(".")
        if rest and local in names:
            used.add(f"{names[local]}.{rest}")
    return {
        name
        for name in used
        if name.startswith("deepspeed.") and (name.startswith("deepspeed.runtime") or "._" in name)
    }


def test_internals_are_recognised():
    assert internals("import deepspeed\ndeepspeed.initialize()") == set()
    assert internals("from deepspeed.utils import groups\ngroups._get()") == {
        "deepspeed.utils.groups._get"
    }
    assert internals("import deepspeed.runtime.zero as z") == {"deepspeed.runtime.zero"}
    assert internals("def f():\n    from deepspeed.runtime import engine") == {
        "deepspeed.runtime.engine"
    }
    assert internals("import deepspeed\ndeepspeed.ops.__x__['a'] = 1") == {"deepspeed.ops.__x__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_outside_uses_deepspeeds_internals(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert internals(path.read_text()) <= allowed
