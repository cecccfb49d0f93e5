"""A stranger's folder of data: its README.md may name files, and those must lie in the folder."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..config.plain_yaml import read_yaml
from ..config.schema import ConfigError


def check_data_folder(source: str, folder: Path) -> None:
    """Raises ConfigError where the folder's README.md names files outside of it.

    The datasets library would read them: any file of this machine, or of the network. source: as it
    was typed, with its key, for messages.
    """
    try:
        text = (folder / "README.md").read_text("utf-8", errors="replace")
    except OSError:
        return
    front = re.match(r"---[ \t]*\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        card = read_yaml(front[1]) if front else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: its README.md does not begin with YAML; repair it") from error
    configs = card.get("configs") if isinstance(card, dict) else None
    for name in _texts(configs):
        if "://" in name or name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts:
            raise ConfigError(
                f"{source}: its README.md names {name[:60]!r}, which is outside of the folder; "
                "copy it there, or name the file itself"
            )


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (list, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(part)
