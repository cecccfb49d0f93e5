"""What a stranger looks for beside the code: one version, an installable project, a container."""

import re
import subprocess
from importlib import import_module

import pytest
import yaml
from helpers import ROOT

CHANGES = (ROOT / "CHANGELOG.md").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"', PYPROJECT, re.M)[1]
PINS = [
    line.split("#")[0].strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_there_is_one_version(tmp_path):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released, date = re.search(r"^## \[([\d.]+)\] - (\S+)", CHANGES, re.M).groups()
    assert VERSION == released == citation["version"]
    assert date == str(citation["date-released"])
    for env in ({"PATH": "/usr/bin:/bin"}, {"PATH": "/usr/bin:/bin", "LOOP_PYTHON": "/nowhere"}):
        said = subprocess.run(
            [ROOT / "launch.sh", "--version"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert (said.returncode, said.stderr) == (0, "")
        assert re.fullmatch(
            rf"soap-loop {VERSION}, commit (unknown|[0-9a-f]+(-dirty)?)\n", said.stdout
        )


def test_pip_finds_the_packages_and_the_pins(monkeypatch):
    monkeypatch.chdir(ROOT)
    configuration = import_module("setuptools.config.pyprojecttoml").read_configuration(
        "pyproject.toml"
    )
    packages = configuration["tool"]["setuptools"]["packages"]
    folders = {
        path.parent
        for folder in ("loop", "kernels_check")
        for path in ROOT.rglob(f"{folder}/**/__init__.py")
    }
    assert {name.replace(".", "/") for name in packages} == {
        folder.relative_to(ROOT).as_posix() for folder in folders
    }
    requirements = [line.split("#")[0].strip() for line in configuration["project"]["dependencies"]]
    assert requirements == PINS and all("==" in pin for pin in PINS)


def test_the_container_is_set_up_as_the_readme_says():
    """Its build needs Docker; here only its steps are held against the README's."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    steps = [line.split(" ", 1) for line in lines if re.match("[A-Z]+ ", line)]
    assert ["RUN", "./launch.sh setup"] in steps
    assert "./launch.sh setup" in (ROOT / "CONTRIBUTING.md").read_text()
    (copied,) = [
        rest.split()[:-1] for word, rest in steps if word == "COPY" and "launch.sh" in rest
    ]
    for name in copied:
        assert (ROOT / name).is_file(), name
    (version,) = [rest for word, rest in steps if word == "FROM"]
    least = re.search(r'requires-python = ">=3\.(\d+)"', PYPROJECT)[1]
    assert int(re.fullmatch(r"python:3\.(\d+)-slim", version)[1]) >= int(least)


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_what_the_pages_name_is_there(page):
    text = (ROOT / page).read_text()
    assert max(map(len, text.splitlines())) <= 120
    paths = re.findall(r"`((?:loop|tests|\.ci)/[\w./]+)`|\]\((\w[\w./]*)\)", text)
    for path in filter(None, (path for pair in paths for path in pair)):
        assert path.startswith("http") or (ROOT / path).exists(), path
