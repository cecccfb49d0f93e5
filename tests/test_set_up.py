"""The lock of all packages, and the kit: what `./launch.sh setup` takes, and from where.

The kit's packages are tiny ones that are made here; pip is the real one.
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from helpers import PYTHON, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# By its files: setuptools refuses to be imported where pip was, or was looked for.
PIP = Path(str(distribution("pip").locate_file("pip")))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PINS = (ROOT / "constraints.txt").read_text()
LOCK = (ROOT / "setup" / "packages.txt").read_text()
CPU_LOCK = (ROOT / "setup" / "torch-cpu.txt").read_text()
# Imported where they are, from no lock: kernels of one's own choice, the peers of the bench.
OPTIONAL = {"flash_attn", "cutlass", "unsloth", "vllm"}


def requirements(text: str) -> list[Requirement]:
    lines = re.findall(r"^(?=[a-z])(.*?)\s*(?:\\|#.*)?$", text, re.M)
    return [Requirement(line) for line in lines]


def environment(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.7",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }


def versions(text: str, python: str) -> dict[str, str]:
    """By package what is installed on Linux; fails where a package has two versions."""
    found = {}
    for requirement in requirements(text):
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            name = canonicalize_name(requirement.name)
            assert name not in found, name
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[name] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_agrees_with_the_pins(python):
    locked, pinned = versions(LOCK, python), versions(PINS, python)
    assert pinned.items() <= locked.items() and len(locked) > 100
    assert versions(CPU_LOCK, python) == {"torch": pinned["torch"] + "+cpu"}


def test_every_locked_file_has_its_hash_and_no_address():
    blocks = re.split(r"^(?=[a-z])", LOCK, flags=re.M)[1:] + [CPU_LOCK[CPU_LOCK.index("torch==") :]]
    for block in blocks:
        hashes = re.findall(r"^    --hash=sha256:([0-9a-f]{64})(?: \\)?$", block, re.M)
        assert hashes and len(hashes) == block.count("--hash"), block[:60]
    assert len(blocks) == len(requirements(LOCK)) + 1
    assert "://" not in LOCK + CPU_LOCK and "index-url" not in LOCK + CPU_LOCK


def test_all_that_a_locked_package_needs_is_locked():
    """Of those that are installed here, by what they say themselves."""
    python = ".".join(map(str, sys.version_info[:2]))
    locked = versions(LOCK, python)
    known = 0
    for name in locked:
        try:
            needs = [Requirement(line) for line in distribution(name).requires or []]
        except PackageNotFoundError:
            continue  # of PyTorch's build for GPUs
        known += 1
        for need in needs:
            if need.marker is None or need.marker.evaluate(environment(python)):
                version = locked[canonicalize_name(need.name)]
                assert need.specifier.contains(version, prereleases=True), (name, need)
    assert known > 80


def imports(path):
    """The top-level names that a file imports from elsewhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_import_belongs_to_a_locked_package():
    locked = set().union(*(versions(LOCK, python) for python in PYTHONS))
    packages = packages_distributions()
    files = {name: [*(ROOT / name).rglob("*.py")] for name in ("loop", "kernels_check", "tests")}
    helpers = {path.stem for path in files["tests"]} | {"broken", "mutants"}
    seen = set()
    for folder, paths in files.items():
        elsewhere = sys.stdlib_module_names | OPTIONAL | {"loop", "kernels_check"}
        if folder == "tests":
            elsewhere |= helpers | {"pip"}  # every environment has pip
        for path in paths:
            for name in set(imports(path)) - elsewhere:
                found = {canonicalize_name(package) for package in packages.get(name, [name])}
                assert found & locked, f"{path.relative_to(ROOT)} imports {name}"
                seen.add(name)
    assert seen > {"torch", "numpy", "pydantic", "yaml", "safetensors", "triton"}


# --- launch.sh and the real pip, on tiny packages ------------------------------------------------

TINY = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "yarl": "1.25.1"}


def make_wheel(folder, name, version) -> str:
    """A package with one empty module; returns the line that locks it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """(the folder that stands for the registry, the locks' texts, an empty environment)"""
    folder = tmp_path_factory.mktemp("registry")
    lines = {name: make_wheel(folder, name, version) for name, version in TINY.items()}
    locks = {
        "torch-cpu.txt": lines["torch"],
        "packages.txt": lines["deepspeed"] + lines["yarl"],
    }
    empty = tmp_path_factory.mktemp("empty") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    (site,) = (empty / "lib").glob("python*/site-packages")
    (site / "pip").symlink_to(PIP)  # unpacking another takes seconds
    return folder, locks, empty


@pytest.fixture(scope="module")
def machine(wheels, tmp_path_factory):
    """A function that makes (a clone, a function that runs its `setup` with words)."""
    registry, locks, empty = wheels

    def make(network=True):
        clone = tmp_path_factory.mktemp("clone")
        (clone / "setup").mkdir()
        for file in ("launch.sh", "constraints.txt", "setup/install.sh"):
            shutil.copy(ROOT / file, clone / file)
        for file, text in locks.items():
            (clone / "setup" / file).write_text(text)

        def set_up(*words):
            if not (clone / ".venv" / "bin").exists():
                shutil.copytree(empty, clone / ".venv", symlinks=True)
            env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
            env |= {"PIP_CONFIG_FILE": os.devnull, "HOME": str(clone)}
            if network:
                env["PIP_FIND_LINKS"] = str(registry)
            command = [clone / "launch.sh", "setup", *words]
            done = subprocess.run(
                command, cwd=clone.parent, env=env, capture_output=True, text=True
            )
            return done.returncode, done.stdout, done.stderr

        return clone, set_up

    return make


@pytest.fixture(scope="module")
def kit_made(machine):
    """(the kit, what its making said); the folder's name has a blank."""
    clone, set_up = machine()
    kit = clone.parent / "a kit"
    return kit, set_up("--wheels", kit.name, "--cpu")


def installed(clone) -> dict[str, str]:
    site = next((clone / ".venv" / "lib").glob("python*/site-packages"))
    found = dict(path.name[:-10].split("-") for path in site.glob("*.dist-info"))
    return {name: version for name, version in found.items() if name in TINY}


def one_line(result) -> str:
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and err.startswith("launch.sh: "), result
    return err


def test_a_file_with_another_hash_is_one_line(machine):
    clone, set_up = machine()
    lock = clone / "setup" / "packages.txt"
    right = lock.read_text()
    place = right.index("yarl==")
    lock.write_text(right[:place] + re.sub("sha256:....", "sha256:0000", right[place:]))
    assert "yarl==1.25.1: not the file that is locked" in one_line(set_up())
    assert "yarl" not in installed(clone)
    lock.write_text(right)
    assert set_up()[0] == 0 and installed(clone) == TINY


def test_a_kit_is_made_here_and_installed_where_no_network_is(machine, kit_made, tmp_path):
    kit, (code, out, err) = kit_made
    assert (code, err) == (0, "") and "made. Where no network is" in out
    files = {path.name for path in kit.iterdir()}
    assert {f"{name}-{version}-py3-none-any.whl" for name, version in TINY.items()} <= files
    kit = shutil.copytree(kit, tmp_path / "a kit")
    (kit / "stranger-1-py3-none-any.whl").write_bytes(b"not of the kit")
    clone, set_up = machine(network=False)
    assert "ERROR: " in one_line(set_up())  # there is no other way here
    code, out, err = set_up("--wheels", str(kit))
    assert (code, err) == (0, "") and installed(clone) == TINY
    assert set_up("--wheels", str(kit))[1].startswith("set up: ")  # once


def damage(kit, clone):
    (kit / "yarl-1.25.1-py3-none-any.whl").write_bytes(b"half of it")
    return "damaged or incomplete, copy it again: yarl-1.25.1-py3-none-any.whl"


def lose(kit, clone):
    (kit / "yarl-1.25.1-py3-none-any.whl").unlink()
    return "damaged or incomplete, copy it again: yarl-1.25.1-py3-none-any.whl"


def make_for_another_python(kit, clone):
    (kit / "for").write_text("3.99 x86_64\n")
    resign(kit)
    return "is for Python 3.99 x86_64, but "


def change_the_lock(kit, clone):
    with open(clone / "setup" / "packages.txt", "a") as lock:
        lock.write("zipp==1 \\\n    --hash=sha256:" + 64 * "0" + "\n")
    return "has other packages than "


def resign(kit):
    names = [line[66:] for line in (kit / "SHA256SUMS").read_text().splitlines()]
    lines = [f"{hashlib.sha256((kit / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (kit / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "spoil", [damage, lose, make_for_another_python, change_the_lock], ids=lambda f: f.__name__
)
def test_a_wrong_kit_is_one_line(machine, kit_made, tmp_path, spoil):
    kit = shutil.copytree(kit_made[0], tmp_path / "kit")
    clone, set_up = machine(network=False)
    says = spoil(kit, clone)
    assert says in one_line(set_up("--wheels", str(kit)))
    assert not installed(clone)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--wheels"], "setup takes --wheels FOLDER [--gpu | --cpu], "),
        (["--wheel", "kit"], "setup takes --wheels FOLDER [--gpu | --cpu], "),
        (["--wheels", "kit", "--tpu"], "a kit takes --gpu or --cpu, not: tpu"),
        (["--wheels", "kit", "--cpu", "--gpu"], "setup takes --wheels FOLDER [--gpu | --cpu], "),
    ],
)
def test_other_words_are_one_line(words, says):
    env = {"PATH": "/usr/bin:/bin", "LOOP_PYTHON": PYTHON}
    command = [ROOT / "launch.sh", "setup", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert says in one_line((done.returncode, done.stdout, done.stderr))
