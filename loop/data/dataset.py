"""The examples of a run: sources, tokens and labels put together, with an account of every row, and kept for the next start."""

import dataclasses

import numpy as np

from ..config.schema import Config, ConfigError
from . import soap
from .cache import _cached, _read_cache, _write_cache
from .conversations import Conversation, read_split
from .report import DatasetReport
from .tokenization import PLAIN_TEMPLATE, Example, encode_examples


def shorten_to_fit(
    tokenizer, conversation: Conversation, max_seq_len: int, supervise: str
) -> Example | None:
    """The example without as few turns from the middle of its dialogue as make it fit; None where even the first and last turn don't.
    The note and the prompt's frame stay whole."""

    def encoded(dialogue: str) -> Example:
        shorter = dataclasses.replace(
            conversation, messages=soap.soap_messages(dialogue, conversation.note)
        )
        return encode_examples(tokenizer, [shorter], supervise)[0]

    fitted = (
        soap.fit_dialogue(
            conversation.dialogue, lambda dialogue: len(encoded(dialogue)), max_seq_len
        )
        if conversation.dialogue
        else None
    )
    return encoded(fitted[0]) if fitted else None


def prepare_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], DatasetReport]:
    """The examples of a split from its sources. Raises ConfigError for bad rows and long examples where data.on_error and data.overlong say so."""
    conversations, skipped = read_split(config, split)
    kept: list[Example] = []
    account = DatasetReport(
        len(conversations) + len(skipped),
        0,
        skipped,
        [],
        [],
        0,
        tokenizer.chat_template == PLAIN_TEMPLATE,
    )
    for start in range(0, len(conversations), 1024):
        chunk = conversations[start : start + 1024]
        for conversation, example in zip(
            chunk, encode_examples(tokenizer, chunk, config.data.supervise)
        ):
            if len(example) > config.max_seq_len:
                if config.data.overlong == "error":
                    raise ConfigError(
                        f"data.{split}, id {example.id}: {len(example)} tokens, more than max_seq_len={config.max_seq_len}; raise it, "
                        "or set data.overlong to drop or truncate_dialogue"
                    )
                shorter = None
                if config.data.overlong == "truncate_dialogue":
                    shorter = shorten_to_fit(
                        tokenizer, conversation, config.max_seq_len, config.data.supervise
                    )
                (account.truncated if shorter else account.dropped).append(example.id)
                if shorter is None:
                    continue
                example = shorter
            account.without_headings += conversation.note is not None and not soap.has_all_sections(
                conversation.note
            )
            kept.append(example)
    account.kept = len(kept)
    return kept, account


def load_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], DatasetReport]:
    """The examples of a split ("train", "valid", "test") and what became of every row. Of several ranks on a machine one does the work and
    the others read its result; so does the next run, as long as not a byte of data, code or tokenizer has changed."""
    with _cached(config, tokenizer, split) as path:
        found = _read_cache(path) if path else None
        if found is None:
            found = prepare_examples(config, tokenizer, split)
            _write_cache(path, *found) if path else None
    examples, account = found
    if not examples and (account.rows or getattr(config.data, split)):
        first = (
            account.skipped
            or [f"{len(account.dropped)} are longer than max_seq_len={config.max_seq_len}"]
        )[0]
        raise ConfigError(f"data.{split}: no example is left ({first})")
    return examples, account


def weights_of(examples: list[Example]) -> np.ndarray | None:
    """How often an epoch visits each example, float [n]; None where all are visited once."""
    weights = np.array([e.weight for e in examples])
    return None if (weights == 1).all() else weights
