"""The examples of a run: sources, tokens and labels put together, with an account of every row, and kept for the next start."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..config.schema import Config
from ..config.source import source_digest
from .readers import digest_sources
from .report import DatasetReport
from .tokenization import Example


@contextlib.contextmanager
def _cached(config: Config, tokenizer, split: str):
    """The file for the token ids of exactly this data, template, tokenizer and code, locked; None without a cache."""
    folder, lock = Path(config.run.dir) / ".tokens", None
    try:
        if config.data.cache and getattr(tokenizer, "is_fast", False):
            digest = hashlib.sha256(digest_sources(config))
            digest.update(
                json.dumps(
                    [split, config.data.model_dump(), config.max_seq_len, tokenizer.chat_template]
                ).encode()
            )
            digest.update(
                repr(sorted(tokenizer.special_tokens_map.items())).encode()
                + tokenizer.backend_tokenizer.to_str().encode()
            )
            digest.update(source_digest("loop/data").encode())
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            lock = (folder / f"{digest.hexdigest()[:24]}.lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # a folder that can't be written costs time, not the run
        lock = None
    try:
        yield Path(lock.name).with_suffix(".safetensors") if lock else None
    finally:
        lock.close() if lock else None


def _read_cache(path: Path) -> tuple[list[Example], DatasetReport] | None:
    try:
        with safe_open(path, "np") as file:
            about = json.loads(file.metadata()["about"])
            input_ids, labels, ends = (
                file.get_tensor(name) for name in ("input_ids", "labels", "ends")
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None  # not there, or not whole: made anew
    os.utime(path)
    parts = zip(
        about["ids"], np.split(input_ids, ends[:-1]), np.split(labels, ends[:-1]), about["weights"]
    )
    return [Example(*part) for part in parts], DatasetReport(**about["account"])


def _write_cache(path: Path, examples: list[Example], account: DatasetReport) -> None:
    about = {
        "ids": [e.id for e in examples],
        "weights": [e.weight for e in examples],
        "account": dataclasses.asdict(account),
    }
    if not examples:
        return
    tensors = {
        "input_ids": np.concatenate([e.input_ids for e in examples]),
        "labels": np.concatenate([e.labels for e in examples]),
        "ends": np.cumsum([len(e) for e in examples]),
    }
    with contextlib.suppress(OSError, SafetensorError):
        save_file(tensors, path.with_suffix(".writing"), metadata={"about": json.dumps(about)})
        path.with_suffix(".writing").rename(path)
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-8]:
            old.unlink()
            old.with_suffix(".lock").unlink()
