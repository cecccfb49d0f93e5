"""Files and folders that are complete or absent, whenever the process is killed."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..config.schema import ConfigError, check_path


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A context with a new folder that becomes `out` at the end, and is deleted after an error.

    Raises ConfigError where `out` is a file or a folder that is not empty, or can't be made.
    """
    check_path("--out", str(out))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already and is not an empty folder")
    temporary = out.absolute().with_name(f".writing-{out.absolute().name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made ({error.strerror})") from error
    try:
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_writable(option: str, path: Path) -> None:
    """Raises ConfigError where no file can be written at the path. It is left as it is."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no such folder: make it, or name another")
    was_there = os.path.lexists(path)
    try:
        with path.open("ab"):
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that only its owner can read: killed meanwhile, it has the old text.

    It is on the disk then. A link is replaced, not followed.
    """
    temporary = path.with_name(f".writing-{path.name}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
