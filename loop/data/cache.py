"""The cache of token ids: what the ranks of a machine share, and what the next run reads.

A file is found by a hash of all that its content depends on: every byte of the data, the settings,
the tokenizer and the source code of this package. So no outdated file is ever read. A cache that
can't be written costs time and nothing else.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ..config.schema import Config
from ..config.source import source_digest
from .report import DatasetReport
from .sources.locations import digest_sources
from .tokenization import Example

MAX_FILES = 8  # the oldest ones above this number are removed
DTYPES = {"int32": "I32", "int64": "I64", "uint8": "U8"}  # as safetensors names them

Parts = Sequence[np.ndarray]  # of a tensor of one dimension, one after another


def cache_key(config: Config, tokenizer, split: str) -> str:
    """24 hex digits that change with the data, the settings, the tokenizer or the code.

    Raises OSError when a file of the data can't be read, ConfigError when a source is missing.
    """
    longest = [config.max_seq_len, tokenizer.model_max_length]
    settings = [split, config.data.model_dump(), longest, tokenizer.chat_template]
    settings.append(config.task.model_dump())
    digest = hashlib.sha256(digest_sources(config))
    digest.update(json.dumps(settings).encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(source_digest("loop/data").encode())
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def cached_path(config: Config, tokenizer, split: str) -> Iterator[Path | None]:
    """The path of the cache file of a split, locked inside the `with` block; None without a cache.

    The file need not exist. Of several ranks, one holds the lock and the others wait for it.
    """
    lock = _acquire_lock(config, tokenizer, split)
    try:
        yield Path(lock.name).with_suffix(".safetensors") if lock else None
    finally:
        if lock:
            lock.close()


def _acquire_lock(config: Config, tokenizer, split: str) -> TextIO | None:
    """The open and locked lock file; None where nothing is cached."""
    if not (config.data.cache and getattr(tokenizer, "is_fast", False)):
        return None
    folder = Path(config.run.dir) / ".tokens"
    try:
        key = cache_key(config, tokenizer, split)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # the dialogues are patients'
        lock = (folder / f"{key}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return None
    return lock


def content_hash(*tensors: Parts) -> str:
    """SHA-256, in hex, of the tensors of a cache file, in any order."""
    hashes = []
    for parts in tensors:
        digest = hashlib.sha256(f"{parts[0].dtype} {sum(map(len, parts))} ".encode())
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
        hashes.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def read_cache(path: Path) -> tuple[list[Example], DatasetReport] | None:
    """The examples and their report; None where the file is missing or damaged.

    Their tokens are views of the file, so all ranks of a machine share them in its page cache.
    """
    try:
        with safe_open(path, "np") as file:  # it checks the header and the file's size
            about, ends = file.get_tensor("about"), file.get_tensor("ends")
            digest = file.metadata()["sha256"]
        input_ids, labels = (_map_tensor(path, name) for name in ("input_ids", "labels"))
        if digest != content_hash([about], [ends], [input_ids], [labels]):
            return None
        about = json.loads(about.tobytes())
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    os.utime(path)  # the files used last are the ones that stay
    columns = zip(
        about["ids"],
        np.split(input_ids, ends[:-1]),
        np.split(labels, ends[:-1]),
        about["weights"],
    )
    return [Example(*column) for column in columns], DatasetReport(**about["report"])


def _map_tensor(path: Path, name: str) -> np.ndarray:
    """A tensor of int32 in a safetensors file, read-only, which is read where it is used."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(header_size))[name]["data_offsets"]
    offset, count = 8 + header_size + start, (end - start) // 4
    return np.asarray(np.memmap(path, np.int32, "r", offset, (count,)))


def write_cache(path: Path, examples: list[Example], report: DatasetReport) -> None:
    """Writes the examples and their report, and removes the files used longest ago.

    Without examples nothing is written; where the file can't be written, nothing happens.
    """
    if not examples:
        return
    about = {
        "ids": [e.id for e in examples],
        "weights": [e.weight for e in examples],
        "report": dataclasses.asdict(report),
    }
    tensors: dict[str, Parts] = {
        "ends": [np.cumsum([len(e) for e in examples])],
        "input_ids": [e.input_ids for e in examples],
        "labels": [e.labels for e in examples],
        # A tensor, because a header of safetensors holds at most 100 MB: some million ids.
        "about": [np.frombuffer(json.dumps(about).encode(), np.uint8)],
    }
    unfinished = path.with_suffix(".writing")
    with contextlib.suppress(OSError):
        # Not forced onto the disk: a file that a crash leaves half written has another hash.
        try:
            _save_tensors(unfinished, tensors)
        except OSError:
            unfinished.unlink(missing_ok=True)  # a full disk needs the room
            raise
        unfinished.rename(path)
        by_age = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        for old in by_age[:-MAX_FILES]:
            old.unlink()
            old.with_suffix(".lock").unlink()


def _save_tensors(path: Path, tensors: dict[str, Parts]) -> None:
    """Writes a file of safetensors, part by part: the library would need it twice in memory."""
    header: dict = {"__metadata__": {"sha256": content_hash(*tensors.values())}}
    end = 0
    for name, parts in tensors.items():
        start, end = end, end + sum(part.nbytes for part in parts)
        header[name] = {
            "dtype": DTYPES[str(parts[0].dtype)],
            "shape": [sum(map(len, parts))],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers after it are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in itertools.chain.from_iterable(tensors.values()):
            file.write(np.ascontiguousarray(part).data)
