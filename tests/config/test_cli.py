"""From the command line to a configuration."""

import subprocess
import sys

import pytest
from helpers import ROOT

from loop.config.cli import load_config
from loop.config.schema import Config, ConfigError

SEED = ROOT / "loop" / "configs" / "soap_qlora.yaml"


def load(*args: str) -> Config:
    return load_config(["--config", str(SEED), *args])


def test_overrides_reach_every_depth():
    c = load(
        "lr=2e-4",
        "lora.r=16",
        "data.train=[a.jsonl, b.jsonl]",
        "run.resume=false",
        "gradient_checkpointing=true",
        "betas=[0.8, 0.9]",
    )
    assert (
        c.lr == 2e-4
        and c.lora["r"] == 16
        and c.data.train == ["a.jsonl", "b.jsonl"]
        and c.run.resume is False
    )
    assert c.gradient_checkpointing is True and c.betas == (0.8, 0.9) and c.lora["lora_alpha"] == 16


@pytest.mark.parametrize("text", ["a: [", "just words", "lr: {x: 1}"])
def test_a_broken_file_is_named(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(tmp_path / "c.yaml")])
    assert "c.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="nowhere.yaml: No such file"):
        load_config(["--config", str(tmp_path / "nowhere.yaml")])


def test_a_data_file_given_as_the_configuration_is_not_quoted(tmp_path):
    (tmp_path / "two.jsonl").write_text(
        '{"id": "a", "dialogue": "Doctor: secret"}\n{"id": "b", "dialogue": "Doctor: secret"}\n'
    )
    with pytest.raises(ConfigError, match="two.jsonl: not YAML in line 2") as caught:
        load_config(["--config", str(tmp_path / "two.jsonl")])
    assert "secret" not in str(caught.value)


def test_a_mistake_ends_the_command_with_2_before_anything_is_loaded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "loop.train", "--config", str(SEED), "lr=abc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("error: lr='abc'")
    )


@pytest.mark.parametrize("closed", [True, False])
def test_a_reader_who_has_gone_is_no_failure(closed):
    """As under `| head -1`; another OSError is still one."""
    code = "from loop.cli import even_if_nobody_reads as quiet\nwith quiet():\n    " + (
        "print('x' * 10**6)" if closed else "open('/no/such/file')"
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    p.stdout.close()
    error = p.stderr.read()
    assert (
        (p.wait(60), error) == (0, "")
        if closed
        else (p.wait(60) == 1 and "FileNotFoundError" in error)
    )
