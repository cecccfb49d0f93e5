"""From the command line to a `Config`: a YAML file, changed by `key=value` arguments.

Every mistake is a ConfigError: one line that names the key. Old names of keys are read in files, as
runs write their configuration down, and refused on the command line.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .device import uses_gpu
from .plain_yaml import read_small_file, read_yaml
from .schema import ROOT, Config, ConfigError

RENAMED = {  # old key -> its name now
    "keep_whole": "replicate_weights",
    "fused": "fused_layers",
    "keep_dequantized": "cache_dequantized_weights",
    "run.bad_steps": "run.max_skipped_in_a_row",
    "run.spike_sigmas": "run.skip_loss_sigmas",
    "run.timeout_minutes": "run.stall_timeout_minutes",
    "run.silence_minutes": "run.heartbeat_timeout_minutes",
    "run.join_minutes": "run.rendezvous_timeout_minutes",
    "run.audit": "run.export_check_examples",
    "data.valid_share": "data.valid_fraction",
    "monitor.sample_max_new_tokens": "generation.max_new_tokens",
}


def take_options(args: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Removes a command's own options from `args` and returns their values.

    defaults: each option with its default. An option is written `--name value` or `--name=value`;
    its value is a text. Raises ConfigError where one has no value, or is there twice.
    """
    options = dict(defaults)
    words = []
    for arg in args:
        name, separator, value = arg.partition("=")
        words += [name, value] if separator and name in options else [arg]
    args[:] = words
    for name in options:
        if name in args:
            at = args.index(name)
            if at + 1 == len(args):
                raise ConfigError(f"{name}: its value is missing")
            options[name] = args[at + 1]
            del args[at : at + 2]
        if name in args:
            raise ConfigError(f"{name}: is there twice; give it once")
    return options


def default_config_path() -> Path:
    """The seed configuration where there is an NVIDIA GPU, the embedded one elsewhere.

    Raises ConfigError for a GPU that torch can't use.
    """
    name = "soap_qlora.yaml" if uses_gpu() else "embedded.yaml"
    return ROOT / "loop" / "configs" / name


def load_config(argv: list[str]) -> Config:
    """The configuration of `[--config FILE] [key=value ...]`.

    E.g. `--config my.yaml lr=2e-4 lora.r=16 data.train=notes.jsonl`. A value is parsed as YAML, so
    lists and null work. `--local_rank=N`, which DeepSpeed's launcher may add, is ignored: the
    environment says the same. Raises ConfigError with one line that names the key.
    """
    args = [arg for arg in argv if not arg.startswith("--local_rank")]
    given = take_options(args, {"--config": None})["--config"]
    if given == "":
        raise ConfigError("--config: its value is empty")
    path = Path(given or default_config_path())
    tree = read_config_file(path)
    for arg in args:
        apply_override(tree, arg)
    try:
        return Config(**tree)
    except ValidationError as error:
        mistake = describe_first_mistake(error)
    except (TypeError, ArithmeticError, RecursionError) as error:  # of a value that no check met
        mistake = f"a value can't be used ({type(error).__name__}: {str(error)[:100]})"
    raise ConfigError(printable(f"{mistake} ({path.name} or the command line)"))


def printable(text: str, most: int = 600) -> str:
    """The text in one line that a terminal can show: other characters as escapes, `most` of all."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= most else f"{line[: most - 150]} ... {line[-140:]}"


def read_config_file(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file, with keys under their names of today. Raises ConfigError."""
    try:
        tree = read_yaml(read_small_file(path))
        tree = {} if tree is None else tree
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # YAML's own message quotes the text, and the file may be one of dialogues.
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1} ({getattr(error, 'problem', '')})" if mark else ""
        if isinstance(error, UnicodeDecodeError):
            where = ", as it is not UTF-8: save it so"
        raise ConfigError(f"--config {path}: not YAML{where}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold `key: value` lines")
    for old, new in RENAMED.items():
        rename_key(tree, old, new, path)
    return tree


def rename_key(tree: dict[str, Any], old: str, new: str, path: Path) -> None:
    """Moves a value of the tree from `old` to `new`, into another section if need be.

    path: for messages. Raises ConfigError where the tree holds both, or where the new key's section
    is a value.
    """
    *sections, old_name = old.split(".")
    section: Any = tree
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or old_name not in section:
        return
    *sections, new_name = new.split(".")
    target: Any = tree
    for name in sections:
        if target.get(name) is None:  # as YAML reads a section without keys
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            raise ConfigError(f"--config {path}: {name} is a value, not a section")
    if new_name in target:
        raise ConfigError(f"--config {path}: {old} is {new} now, and both are there")
    target[new_name] = section.pop(old_name)


def apply_override(tree: dict[str, Any], arg: str) -> None:
    """Sets the value of one `key=value` argument in the tree. Raises ConfigError."""
    key, separator, value = arg.partition("=")
    if not separator or key.startswith("-"):
        raise ConfigError(f"{printable(arg)}: not understood; write --config FILE or key=value")
    if any("\ud800" <= c <= "\udfff" for c in arg):  # how Python shows bytes that are no UTF-8
        raise ConfigError(f"{printable(arg)}: is not UTF-8; type it anew, or put it in a file")
    if key in RENAMED:
        raise ConfigError(f"{key} is {RENAMED[key]} now")
    *sections, last = key.split(".")
    section = tree
    for name in sections:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{key}: {name} is a value, not a section")
    try:
        section[last] = read_yaml(value)
    except yaml.YAMLError as error:
        problem = str(getattr(error, "problem", error)).splitlines()[0]
        raise ConfigError(printable(f"{key}={value[:60]}: not a YAML value: {problem}")) from error


def describe_first_mistake(error: ValidationError) -> str:
    """One line on the first key that is wrong: its name, its value, and what is allowed."""
    mistakes = error.errors(include_url=False)
    key = key_of(mistakes[0])
    first = mistakes[0]
    if first["type"] == "extra_forbidden":
        what = f"is {RENAMED[key]} now" if key in RENAMED else "unknown key"
    else:
        # Of a union of types pydantic reports every one that does not fit.
        messages = [mistake["msg"] for mistake in mistakes if key_of(mistake) == key]
        what = " or ".join(message.removeprefix("Value error, ") for message in messages)
    if not key:
        return what
    value = first["input"]
    shown = f"={shortened(value)}" if isinstance(value, (str, int, float)) else ""
    return f"{key}{shown}: {what}"


def shortened(value) -> str:
    """A value as Python writes it, 60 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def key_of(mistake) -> str:
    """The dotted key of one of pydantic's errors, without the type that it tried for a union."""
    types = ("literal[", "list[", "dict[", "bool", "int", "str")
    return ".".join(str(part) for part in mistake["loc"] if not str(part).startswith(types))
