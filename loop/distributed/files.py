"""A run's folder: made, locked against a second run, and its files whole whenever the process is killed."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from ..config.schema import ConfigError


@contextlib.contextmanager
def atomic_folder(out: Path):
    """A new folder that becomes `out` at the end, and is gone when something goes wrong. Raises ConfigError where `out` is in use."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already and is not an empty folder")
    aside = out.absolute().with_name(f".writing-{out.absolute().name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is whole whenever the process is killed, the old text or the new one, and readable by its owner alone."""
    aside = path.with_name(f".writing-{path.name}")
    with open(
        os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    aside.replace(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
