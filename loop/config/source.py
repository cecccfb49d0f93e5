"""A digest of this project's own source code, by folder: results of other code are not trusted."""

import hashlib

from .schema import ROOT


def source_digest(*folders: str) -> str:
    """SHA-256, in hex, of the names and contents of all .py files below the folders.

    folders: relative to the repository, e.g. "loop/data". It looks at folders and not at a list of
    files, so that a file that moves or is added counts by itself. Raises FileNotFoundError for a
    folder without source.
    """
    digest = hashlib.sha256()
    for folder in folders:
        paths = sorted((ROOT / folder).rglob("*.py"))
        if not paths:
            raise FileNotFoundError(f"{ROOT / folder} holds no source")
        for path in paths:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
