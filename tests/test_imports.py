"""The one import rule: a package of loop/ imports only packages below it, and no two modules import
each other.
"""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

LOOP = ROOT / "loop"
# From the bottom to the top. A package imports from lower floors and from itself alone; `train` is
# loop/train.py.
FLOORS = (
    {"config", "facts"},
    {"untrusted"},
    {"distributed"},
    {"data"},
    {"kernels"},
    {"fp8", "optim"},
    {"memory"},
    {"zero3"},
    {"model"},
    {"families"},
    {"generation"},
    {"evaluation"},
    {"checkpoint"},
    {"monitor", "export"},
    {"gguf"},
    {"train"},
    {"commands", "bases", "sweep"},
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
MOST_MODULES = 12


def module_name(path: Path) -> str:
    """`loop.data.collate` of its file; a package is its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports anywhere in it, functions included."""
    name, found = module_name(path), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            found |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
                for alias in node.names
            }
    return found & modules


def import_graph() -> dict[str, set[str]]:
    paths = [path for folder in ("loop", "kernels_check") for path in (ROOT / folder).rglob("*.py")]
    modules = {module_name(path) for path in paths}
    return {module_name(path): imported_modules(path, modules) for path in paths}


GRAPH = import_graph()
EDGES = sorted((module, other) for module, others in GRAPH.items() for other in others)


def package_of(module: str) -> str:
    """`data` of `loop.data.collate`, `train` of `loop.train`, `kernels_check` of anything there."""
    parts = module.split(".")
    return parts[1] if parts[0] == "loop" and len(parts) > 1 else parts[0]


def test_a_package_imports_only_packages_below_it():
    wrong = [
        f"{module} imports {other}"
        for module, other in EDGES
        for mine, theirs in [(package_of(module), package_of(other))]
        if mine != theirs and mine in FLOOR_OF and not FLOOR_OF.get(theirs, 99) < FLOOR_OF[mine]
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_check_and_the_embedded_clinic_use_what_they_may():
    allowed = {
        "kernels_check": {
            "kernels",
            "fp8",
            "config",
            "distributed",
            "monitor",
            "optim",
            "zero3",
            "model",
        },
        "embedded": {"data"},
    }
    for mine, packages in allowed.items():
        used = {package_of(other) for module, other in EDGES if package_of(module) == mine}
        assert used - {mine} <= packages, mine


def test_no_two_modules_import_each_other():
    def reach(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in GRAPH[module]:
                reach(other, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in GRAPH:
        reach(module, ())


def test_a_folder_holds_few_modules():
    for folder in {path.parent for path in LOOP.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, folder


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_no_function_imports_the_project_to_dodge_a_circle(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.is_file() else ROOT / module.replace(".", "/") / "__init__.py"
    tree = ast.parse(path.read_text())
    late = [
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").startswith("loop"))
    ]
    assert not late, [ast.unparse(node) for node in late]
