"""A GPU that torch can't use is one line and exit code 2, unless the CPU was asked for by name."""

import os
import sys

import pytest
import torch
from helpers import ROOT, run

from loop.commands import train
from loop.config import device
from loop.config.cli import load_config
from loop.config.device import (
    Card,
    asked_for_cpu,
    card_refusal,
    find_card,
    runs_on,
    uses_gpu,
    why_unusable,
)
from loop.config.schema import ConfigError

HEADER = "| NVIDIA-SMI 470.82  Driver Version: 470.82.01  CUDA Version: 11.4 |"
LISTED = "GPU 0: NVIDIA A10 (UUID: GPU-1b2c)"


def plant_driver(folder, monkeypatch, script: str) -> None:
    """Puts an nvidia-smi before all others on PATH."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def old_driver(query: str = "470.82.01") -> str:
    answers = {"-L": LISTED, "--query*": query, "*": HEADER}
    cases = " ".join(f'{asked}) echo "{said}" ;;' for asked, said in answers.items())
    return f'case "$*" in {cases} esac'


@pytest.fixture
def blind_torch(monkeypatch):
    """A CUDA 13 build that sees no GPU, on any machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_an_old_driver_is_named_with_card_cuda_and_remedy(tmp_path, monkeypatch, blind_torch):
    for query in ("470.82.01", "Field is not valid"):  # the second is read from the header
        plant_driver(tmp_path, monkeypatch, old_driver(query))
        with pytest.raises(ConfigError) as caught:
            uses_gpu()
        for words in (
            "NVIDIA A10 (driver 470.82.01, CUDA 11.4 at most)",
            f"too old for torch {torch.__version__}, CUDA 13.0",
            "580 or newer: update the driver",
            "DS_ACCELERATOR=cpu ./launch.sh",
        ):
            assert words in str(caught.value)
    with pytest.raises(ConfigError, match="too old"):  # before it chooses a configuration
        load_config([])


def test_the_cpu_by_name_is_no_mistake(tmp_path, monkeypatch, blind_torch):
    plant_driver(tmp_path, monkeypatch, old_driver())
    for name, value in (
        ("DS_ACCELERATOR", "cpu"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert asked_for_cpu() and not uses_gpu()
    assert not asked_for_cpu()


def test_a_device_by_name_that_is_not_here_is_a_mistake(tmp_path, monkeypatch, blind_torch):
    plant_driver(tmp_path, monkeypatch, "exit 1")
    assert not uses_gpu()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ConfigError, match="^DS_ACCELERATOR=cuda: there is no such device; leave"):
        uses_gpu()


def test_a_silent_driver_counts_where_there_is_a_card(tmp_path, monkeypatch, blind_torch):
    plant_driver(tmp_path, monkeypatch, "echo mismatch >&2; exit 18")
    monkeypatch.setattr(device, "_pci_vendors", lambda: [tmp_path])
    with pytest.raises(ConfigError, match="driver unknown.*does not answer: install it anew"):
        uses_gpu()
    monkeypatch.setattr(device, "_pci_vendors", lambda: [])
    assert not uses_gpu()
    plant_driver(tmp_path, monkeypatch, "echo No devices found.")
    assert find_card() is None


def test_other_reasons_are_told_apart(monkeypatch, blind_torch):
    def fail():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount().\nmore")

    monkeypatch.setattr(torch.cuda, "init", fail)
    new = Card("NVIDIA A10", "580.65", "13.0")
    assert "says: Unexpected error from cudaGetDeviceCount(). Look at" in why_unusable(new)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is the build for CPUs: remove .venv" in why_unusable(new)


@pytest.mark.parametrize(
    ("name", "capability", "says"),
    [
        ("Tesla T4", (7, 5), "no bf16.*fp16 is not supported.*8.0 or newer"),
        ("NVIDIA RTX 9090", (14, 0), "newer than torch.*CUDA 13.0.*sm_80 sm_90"),
        ("NVIDIA L4", (8, 9), None),
    ],
)
def test_a_card_that_cannot_compute_this_is_refused_by_name(name, capability, says, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for function, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": capability,
        "get_device_name": name,
        "get_arch_list": ["sm_80", "sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    if says:
        with pytest.raises(ConfigError, match=f"{name}.*{says}"):
            uses_gpu()
    else:
        assert uses_gpu()


def test_code_runs_on_its_own_generation_or_is_compiled():
    assert runs_on((8, 6), ["sm_80"]) and runs_on((9, 0), ["sm_90a"]) and runs_on((9, 0), [])
    assert not runs_on((8, 0), ["sm_86"]) and not runs_on((12, 0), ["sm_90", "sm_100"])
    assert runs_on((12, 0), ["sm_90", "compute_90"]) and not runs_on((8, 0), ["compute_90"])


def test_training_ends_with_2_before_the_data_is_read(tmp_path, monkeypatch, blind_torch, capsys):
    plant_driver(tmp_path, monkeypatch, old_driver())
    seed = str(ROOT / "loop/configs/soap_qlora.yaml")  # named, so that nothing has to be chosen
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", seed, f"run.dir={tmp_path}/runs", "data.train=nowhere.jsonl"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: NVIDIA A10 (driver 470.82.01") and "nowhere" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="plants a driver that torch can't use")
def test_no_command_goes_on_with_the_cpu_unasked(tmp_path, monkeypatch):
    plant_driver(tmp_path, monkeypatch, old_driver())
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    dialogue = ["--dialogue", "tests/dialogue.txt", "--base", "loop/embedded/base"]
    for words in ([], ["plan"], ["evaluate"], ["profile"], ["bench"], ["generate", *dialogue]):
        command = [str(ROOT / "launch.sh"), *words]
        done = run(command, 120, cwd=ROOT, env=env | {"LOOP_PYTHON": sys.executable})
        assert done.returncode == 2, (words, done.stderr)
        assert "NVIDIA A10 (driver 470.82.01" in done.stderr, words


def test_every_visible_card_is_looked_at(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", ["L4", "T4"].__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(8, 9), (7, 5)].__getitem__)
    assert card_refusal().startswith("GPU 1, T4 (compute capability 7.5) has no bf16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert card_refusal() is None


def test_a_user_without_a_home_has_a_cache_of_this_process(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert device.user_cache() == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert device.user_cache() == tmp_path / ".cache"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(device.Path, "home", no_home)
    monkeypatch.setattr(device.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    device._new_cache.cache_clear()
    assert device.user_cache() == tmp_path / "soap-loop-"
    device._new_cache.cache_clear()
