"""From the command line to a configuration."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers import CPU, PYTHON, ROOT

from loop.config.cli import RENAMED, load_config
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
    assert c.lr == 2e-4 and c.lora["r"] == 16 and c.run.resume is False
    assert c.data.train == ["a.jsonl", "b.jsonl"] and c.gradient_checkpointing is True
    assert c.betas == (0.8, 0.9) and c.lora["lora_alpha"] == 16


@pytest.mark.parametrize("text", ["a: [", "just words", "lr: {x: 1}"])
def test_a_broken_file_is_named(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(tmp_path / "c.yaml")])
    assert "c.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="nowhere.yaml: No such file"):
        load_config(["--config", str(tmp_path / "nowhere.yaml")])


def test_a_file_of_windows_is_read_or_told(tmp_path):
    path = tmp_path / "c.yaml"
    text = "base: x\r\ndata: {train: x}\r\nlr: 5.0e-4\r\n"
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_config(["--config", str(path)]).lr == 5e-4
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match="not YAML, as it is not UTF-8: save it so"):
        load_config(["--config", str(path)])


WORDS = "Doctor: any pain? Patient: a secret one. " * 10


@pytest.mark.parametrize(
    "arg",
    ["data.train=", "data.valid=[x, ", "data.test=", "base=", "adapter=", "run.dir=", "run.name="]
    + ["deepspeed="],
)
def test_what_can_be_no_path_is_told_without_its_words(arg):
    key = arg.split("=")[0]
    for text in (f"'{WORDS}'", f"/{5000 * 'x'}", '"a\\0b"', '"a\\e[31mb"'):
        with pytest.raises(ConfigError, match=f"{key}: ") as error:
            load_config([f"{arg}{text}" + "]" * ("[" in arg)])
        assert "secret" not in str(error.value) and len(str(error.value)) < 150


def test_a_data_file_given_as_the_configuration_is_not_quoted(tmp_path):
    (tmp_path / "two.jsonl").write_text(
        '{"id": "a", "dialogue": "Doctor: secret"}\n{"id": "b", "dialogue": "Doctor: secret"}\n'
    )
    with pytest.raises(ConfigError, match="two.jsonl: not YAML in line 2") as caught:
        load_config(["--config", str(tmp_path / "two.jsonl")])
    assert "secret" not in str(caught.value)


def test_a_mistake_ends_the_command_with_2_before_anything_is_loaded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "loop.commands.train", "--config", str(SEED), "lr=abc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: lr='abc'")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_on_the_command_line_and_read_in_a_file(old, new, tmp_path):
    value = "0.5" if new == "data.valid_fraction" else "true"
    value = "3" if new.startswith(("run.", "generation.")) else value
    with pytest.raises(ConfigError, match=f"^{re.escape(old)} is {re.escape(new)} now$"):
        load(f"{old}={value}")
    section, _, name = old.rpartition(".")
    text = f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}"
    path = tmp_path / "c.yaml"
    path.write_text(f"base: x\n{text}\n")
    config = load_config(["--config", str(path), "data.train=x"])
    changed = load(f"{new}={value}")
    for part in new.split("."):
        config, changed = getattr(config, part), getattr(changed, part)
    assert config == changed == yaml.safe_load(value)
    with pytest.raises(ConfigError, match=f"{re.escape(old)} is .* now, and both are there"):
        new_section, _, name = new.rpartition(".")
        if new_section != section:
            both = f"{text}\n{new_section}: {{{name}: {value}}}"
        elif section:
            both = text.replace("}", f", {name}: {value}}}")
        else:
            both = f"{text}\n{name}: {value}"
        path.write_text(f"base: x\n{both}\n")
        load_config(["--config", str(path), "data.train=x"])


def test_an_old_key_ends_a_command_with_2_and_one_line():
    command = [PYTHON, "-m", "loop.commands.plan", "--config", str(SEED), "keep_whole=true"]
    env = os.environ | CPU
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: keep_whole is replicate_weights now\n")
    with pytest.raises(ConfigError, match="run.bad_steps.* is run.max_skipped_in_a_row now"):
        load("run={bad_steps: 1}")


def test_an_option_that_is_there_twice_is_named():
    with pytest.raises(ConfigError, match="^--config: is there twice; give it once$"):
        load("--config", "other.yaml")


@pytest.mark.parametrize("arg", ["\udcff=1", "run.name=\udcff", "\udcff"])
def test_bytes_that_are_no_utf_8_are_named(arg):
    """Python shows such a byte of the command line as half of a surrogate pair."""
    with pytest.raises(ConfigError, match=r"\\udcff.*: (is not UTF-8|not understood)") as caught:
        load(arg)
    assert str(caught.value).isascii()
