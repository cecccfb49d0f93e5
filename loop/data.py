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

from . import leaks, readers, soap, sources, tokens
from .config import Config, ConfigError
from .readers import digest_sources
from .sources import Conversation, read_split
from .tokens import PLAIN_TEMPLATE, Example, encode_examples


@dataclasses.dataclass
class Account:
    """What became of every row that was read: kept + skipped + dropped = rows."""

    rows: int
    kept: int
    skipped: list[str]  # bad rows, each with its place and what to do about it
    dropped: list[str]  # ids of examples longer than max_seq_len
    truncated: list[str]  # ids of kept examples whose dialogue was shortened to fit
    without_headings: int  # notes, among those kept, that lack S, O, A and P in order
    plain_template: bool  # the base brings no chat template, so the project's own was used

    def lines(self, split: str, max_seq_len: int) -> list[str]:
        """What to say of it: nothing left out, nothing said."""
        told = []
        for what, ids in (("skipped", self.skipped), ("dropped", self.dropped), ("truncated", self.truncated)):
            if ids:
                why = {"skipped": "bad rows", "dropped": f"longer than {max_seq_len:,} tokens", "truncated": "dialogues shortened to fit"}[what]
                joint = "\n            " if what == "skipped" else ", "
                told.append(f"{what:11} {len(ids):,} of {self.rows:,} in data.{split}, {why}: {joint.join(ids[:8])}{' ...' if len(ids) > 8 else ''}")
        if self.without_headings:
            told.append(f"headings    {self.without_headings:,} of {self.kept:,} notes in data.{split} lack S:, O:, A:, P: in this order")
        if self.plain_template:
            told.append("template    the base has no chat template; the project's plain one is used, in training and generation")
        return told


def shorten_to_fit(tokenizer, conversation: Conversation, max_seq_len: int, supervise: str) -> Example | None:
    """The example without as few turns from the middle of its dialogue as make it fit; None where even the first and last turn don't.
    The note and the prompt's frame stay whole."""

    def encoded(dialogue: str) -> Example:
        shorter = dataclasses.replace(conversation, messages=soap.soap_messages(dialogue, conversation.note))
        return encode_examples(tokenizer, [shorter], supervise)[0]

    fitted = soap.fit_dialogue(conversation.dialogue, lambda dialogue: len(encoded(dialogue)), max_seq_len) if conversation.dialogue else None
    return encoded(fitted[0]) if fitted else None


def prepare_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], Account]:
    """The examples of a split from its sources. Raises ConfigError for bad rows and long examples where data.on_error and data.overlong say so."""
    conversations, skipped = read_split(config, split)
    kept: list[Example] = []
    account = Account(len(conversations) + len(skipped), 0, skipped, [], [], 0, tokenizer.chat_template == PLAIN_TEMPLATE)
    for start in range(0, len(conversations), 1024):
        chunk = conversations[start : start + 1024]
        for conversation, example in zip(chunk, encode_examples(tokenizer, chunk, config.data.supervise)):
            if len(example) > config.max_seq_len:
                if config.data.overlong == "error":
                    raise ConfigError(f"data.{split}, id {example.id}: {len(example)} tokens, more than max_seq_len={config.max_seq_len}; raise it, "
                                      "or set data.overlong to drop or truncate_dialogue")  # fmt: skip
                shorter = None
                if config.data.overlong == "truncate_dialogue":
                    shorter = shorten_to_fit(tokenizer, conversation, config.max_seq_len, config.data.supervise)
                (account.truncated if shorter else account.dropped).append(example.id)
                if shorter is None:
                    continue
                example = shorter
            account.without_headings += conversation.note is not None and not soap.has_all_sections(conversation.note)
            kept.append(example)
    account.kept = len(kept)
    return kept, account


def load_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], Account]:
    """The examples of a split ("train", "valid", "test") and what became of every row. Of several ranks on a machine one does the work and
    the others read its result; so does the next run, as long as not a byte of data, code or tokenizer has changed."""
    with _cached(config, tokenizer, split) as path:
        found = _read_cache(path) if path else None
        if found is None:
            found = prepare_examples(config, tokenizer, split)
            _write_cache(path, *found) if path else None
    examples, account = found
    if not examples and (account.rows or getattr(config.data, split)):
        first = (account.skipped or [f"{len(account.dropped)} are longer than max_seq_len={config.max_seq_len}"])[0]
        raise ConfigError(f"data.{split}: no example is left ({first})")
    return examples, account


def weights_of(examples: list[Example]) -> np.ndarray | None:
    """How often an epoch visits each example, float [n]; None where all are visited once."""
    weights = np.array([e.weight for e in examples])
    return None if (weights == 1).all() else weights


@contextlib.contextmanager
def _cached(config: Config, tokenizer, split: str):
    """The file for the token ids of exactly this data, template, tokenizer and code, locked; None without a cache."""
    folder, lock = Path(config.run.dir) / ".tokens", None
    try:
        if config.data.cache and getattr(tokenizer, "is_fast", False):
            digest = hashlib.sha256(digest_sources(config))
            digest.update(json.dumps([split, config.data.model_dump(), config.max_seq_len, tokenizer.chat_template]).encode())
            digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode() + tokenizer.backend_tokenizer.to_str().encode())
            for module in (__file__, tokens.__file__, soap.__file__, readers.__file__, sources.__file__, leaks.__file__):
                digest.update(Path(module).read_bytes())
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


def _read_cache(path: Path) -> tuple[list[Example], Account] | None:
    try:
        with safe_open(path, "np") as file:
            about = json.loads(file.metadata()["about"])
            input_ids, labels, ends = (file.get_tensor(name) for name in ("input_ids", "labels", "ends"))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None  # not there, or not whole: made anew
    os.utime(path)
    parts = zip(about["ids"], np.split(input_ids, ends[:-1]), np.split(labels, ends[:-1]), about["weights"])
    return [Example(*part) for part in parts], Account(**about["account"])


def _write_cache(path: Path, examples: list[Example], account: Account) -> None:
    about = {"ids": [e.id for e in examples], "weights": [e.weight for e in examples], "account": dataclasses.asdict(account)}
    if not examples:
        return
    tensors = {"input_ids": np.concatenate([e.input_ids for e in examples]), "labels": np.concatenate([e.labels for e in examples]),
               "ends": np.cumsum([len(e) for e in examples])}  # fmt: skip
    with contextlib.suppress(OSError, SafetensorError):
        save_file(tensors, path.with_suffix(".writing"), metadata={"about": json.dumps(about)})
        path.with_suffix(".writing").rename(path)
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-8]:
            old.unlink()
            old.with_suffix(".lock").unlink()
