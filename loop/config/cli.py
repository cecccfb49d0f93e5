"""From the command line to a configuration: YAML + `key=value`, every mistake one line that names the key."""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .schema import ROOT, Config, ConfigError


def take_options(args: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Takes `--name value` pairs, also as `--name=value`, out of `args` for the commands that have options beside the configuration."""
    options = dict(defaults)
    args[:] = [
        part
        for arg in args
        for part in (arg.split("=", 1) if arg.split("=")[0] in options else [arg])
    ]
    for name in options:
        if name in args:
            at = args.index(name)
            if at + 1 == len(args):
                raise ConfigError(f"{name}: its value is missing")
            options[name] = args.pop(at + 1)
            args.pop(at)
    return options


def default_config_path() -> Path:
    """The seed configuration where there is an NVIDIA GPU, the embedded one elsewhere."""
    import torch

    gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    return ROOT / "loop" / "configs" / ("soap_qlora.yaml" if gpu else "embedded.yaml")


def load_config(argv: list[str]) -> Config:
    """Reads `[--config FILE] [key=value ...]`, e.g. `--config my.yaml lr=2e-4 lora.r=16 data.train=notes.jsonl`.

    A value is parsed as YAML, so lists and null work. Raises ConfigError with one line that names the key."""
    args = [
        a for a in argv if not a.startswith("--local_rank")
    ]  # DeepSpeed's launcher may add it; the environment says the same
    path = Path(take_options(args, {"--config": None})["--config"] or default_config_path())
    try:
        tree = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
    ) as error:  # without the text that is quoted: the file may be one of dialogues
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1} ({getattr(error, 'problem', '')})" if mark else ""
        raise ConfigError(f"--config {path}: not YAML{where}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold `key: value` lines")
    for arg in args:
        key, separator, value = arg.partition("=")
        if not separator or key.startswith("-"):
            raise ConfigError(f"{arg}: not understood; write --config FILE or key=value")
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {name} is a value, not a section")
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}={value}: not a YAML value") from error
    try:
        return Config(**tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        branches = (
            "literal[",
            "list[",
            "dict[",
            "bool",
            "int",
            "str",
        )  # which branch of a union pydantic tried
        keys = [
            ".".join(str(part) for part in e["loc"] if not str(part).startswith(branches))
            for e in errors
        ]
        key, first = keys[0], errors[0]
        what = " or ".join(
            e["msg"].removeprefix("Value error, ") for k, e in zip(keys, errors) if k == key
        )
        if first["type"] == "extra_forbidden":
            what = "unknown key"
        shown = (
            f"={first['input']!r}" if key and isinstance(first["input"], (str, int, float)) else ""
        )
        raise ConfigError(
            f"{key}{shown}{': ' if key else ''}{what} ({path.name} or the command line)"
        ) from error
