"""`./launch.sh COMMAND --help`: answered before anything is installed, complete, and true."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import LAUNCH_COMMANDS, ROOT, run

from loop.config.help import COMMANDS, REQUIRED, SCHEMA, Key, help_text, read_keys
from loop.config.schema import Config, Section

# Where the options of a command are read.
SOURCES = {
    "train": ["loop/distributed/launcher.py"],
    "profile": ["loop/distributed/launcher.py"],
    "evaluate": [
        "loop/distributed/launcher.py",
        "loop/commands/evaluate.py",
        "loop/commands/canaries.py",
    ],
    "setup": [],
    "sweep": ["loop/sweep/grid.py"],
    "check": ["kernels_check/__main__.py"],
    "bench": ["tests/bench/__main__.py"],
    "break": ["tests/broken/__main__.py"],
}
IN_LAUNCH_SH = {
    "train": {"--verify-resume"},
    "setup": {"--wheels", "--gpu", "--cpu", "--flash-attn", "--flash-attn-4", "--smollm2"},
}
NOT_READ = {"--module"}  # passed on to DeepSpeed's launcher


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A clone without .venv, and a Python that has the standard library alone."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(ROOT / "launch.sh", folder)
    (folder / "loop" / "config").mkdir(parents=True)
    for name in ("help.py", "schema.py"):
        shutil.copy(ROOT / "loop" / "config" / name, folder / "loop" / "config")
    python = folder / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return folder


def ask(folder, *args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": str(folder / "python")}
    env.pop("LOOP_PYTHON", None)
    command = [str(folder / "launch.sh"), *args]
    return run(command, 20, env=env, cwd=folder)


@pytest.mark.parametrize("name", [name for name in LAUNCH_COMMANDS if name != "help"])
def test_help_is_answered_before_anything_is_installed(bare, name):
    files = sorted(bare.rglob("*"))
    done = ask(bare, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == help_text(name) + "\n"
    assert done.stdout.startswith(f"usage: ./launch.sh {name} ")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert sorted(bare.rglob("*")) == files


def test_help_is_found_anywhere_and_train_is_the_default(bare):
    for args in (["-h"], ["--help"]):
        assert "COMMAND --help" in ask(bare, *args).stdout
    for args in (["lr=1", "--help"], ["--config", "x.yaml", "-h"], ["train", "a=b", "-h"]):
        assert ask(bare, *args).stdout == help_text("train") + "\n"


def test_an_old_python_is_refused(bare):
    old = bare / "old"
    old.write_text('#!/bin/sh\n[ "$1" != --version ] || echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    env = os.environ | {"PYTHON": str(old)}
    env.pop("LOOP_PYTHON", None)
    command = [str(bare / "launch.sh"), "plan", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "3.10" in done.stderr and done.stderr.count("\n") == 1


def defaults(section: type[Section], prefix: str = "") -> dict:
    """Every key below a section with its default; REQUIRED where it has none."""
    found = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= defaults(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = REQUIRED if field.is_required() else field.default
    return found


def as_read(key: Key):
    value = yaml.safe_load(key.default)
    return float(value) if key.type.startswith("number") and value is not None else value


def test_the_help_shows_every_key_with_its_default_and_its_meaning():
    keys = {key.name: key for key in read_keys(SCHEMA.read_text())}
    expected = defaults(Config)
    assert keys.keys() == expected.keys()
    for name, default in expected.items():
        key = keys[name]
        if default == REQUIRED:
            assert key.default == REQUIRED
        else:
            assert as_read(key) == (list(default) if isinstance(default, tuple) else default), name
        assert key.meaning.endswith(".") and key.type, name
        for command in ("train", "evaluate", "plan", "preview", "audit", "profile"):
            assert f"\n  {name}={key.default}" in help_text(command)
    assert "lr=0.0001" in help_text("train") and "[number, number]" in help_text("train")


def test_every_field_of_the_schema_is_described():
    sections = [Config, *(f.annotation for f in Config.model_fields.values())]
    for section in sections:
        if isinstance(section, type) and issubclass(section, Section):
            for name, field in section.model_fields.items():
                assert field.description, name


def options_in(path: str) -> set[str]:
    """The options that a source reads: of argparse, or the constants that look like one."""
    tree = ast.parse((ROOT / path).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"
    ]
    nodes = [call.args[0] for call in added] or list(ast.walk(tree))
    constants = {n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str}
    return {value for value in constants if re.fullmatch(r"--[a-z][a-z-]*", value)} - NOT_READ


@pytest.mark.parametrize(
    "name", [name for name in LAUNCH_COMMANDS if name not in ("help", "board", "test")]
)
def test_the_help_names_the_options_that_the_command_reads(name):
    options = {option.split()[0] for option in COMMANDS[name].options}
    read = IN_LAUNCH_SH.get(name, set())
    assert all(option in (ROOT / "launch.sh").read_text() for option in read)
    for path in SOURCES.get(name, [f"loop/commands/{name}.py"]):
        read = read | options_in(path)
    assert {option for option in options if option.startswith("--")} == read
