"""The examples of a run: its sources read, rendered, tokenised and labelled.

`load_training_data` is what the loop calls; `load_examples` gives one split, from the cache where
that has it. No row is lost without an entry in the `DatasetReport`.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..config.schema import Config, ConfigError
from . import soap
from .cache import cached_path, read_cache, write_cache
from .conversations import Conversation, dialogue_text, note_text, read_split
from .identifiers import find_identifiers
from .parallel import in_chunks, map_chunks
from .report import DatasetReport
from .tokenization import (
    IGNORE,
    PLAIN_TEMPLATE,
    Example,
    RefusedChatError,
    encode_examples,
)

# HTML that was left in a text, as web forms and exports leave it.
MARKUP = re.compile(
    r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{1,5}|#x[0-9a-f]{1,5});"
    r"|</?(?:p|br|div|span|b|i|u|strong|em|li|ul|ol|td|tr|h[1-6])(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)


@dataclasses.dataclass
class TrainingData:
    """What a run learns from and is validated on."""

    train: list[Example]
    valid: list[Example]
    samples: list[Example]  # the examples of `valid` that sample notes are written for
    lengths: np.ndarray  # int64 [train], tokens
    num_targets: np.ndarray  # int64 [train], supervised tokens
    weights: np.ndarray | None  # float64 [train], visits an epoch; None: one each
    reports: dict[str, DatasetReport]  # of "train" and "valid"

    @property
    def supervised_fraction(self) -> float:
        """The fraction of the training tokens that are supervised."""
        return float(self.num_targets.sum() / self.lengths.sum())

    def token_ids(self) -> dict[str, np.ndarray]:
        """The token ids of all examples, by id."""
        return {e.id: e.input_ids for e in self.train + self.valid}


def load_training_data(config: Config, tokenizer) -> TrainingData:
    """The training and validation examples of a run. Raises ConfigError for what is wrong."""
    train, train_report = load_examples(config, tokenizer, "train")
    valid, valid_report = load_examples(config, tokenizer, "valid")
    samples = [e for e in valid if e.id in config.monitor.sample_notes]
    missing = set(config.monitor.sample_notes) - {e.id for e in samples}
    if missing:
        raise ConfigError(
            f"monitor.sample_notes: {sorted(missing)[0]} is not an id of data.valid, or is longer "
            "than max_seq_len"
        )
    run = config.run
    if not valid and (run.export == "best" or run.patience or config.monitor.best != "loss"):
        raise ConfigError(
            "run.export=best, run.patience and monitor.best need validation examples, and "
            f"data.valid_fraction={config.data.valid_fraction} of data.train is none; raise it"
        )
    return TrainingData(
        train=train,
        valid=valid,
        samples=samples,
        lengths=np.array([len(e) for e in train]),
        num_targets=np.array([e.num_targets for e in train]),
        weights=visit_weights(train),
        reports={"train": train_report, "valid": valid_report},
    )


def load_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], DatasetReport]:
    """The examples of a split ("train", "valid", "test") and the report on all its rows.

    Of several ranks on a machine, one prepares the examples and the others read its result. So does
    the next run, until a byte of the data, the code or the tokenizer changes. Raises ConfigError
    when no example is left.
    """
    with cached_path(config, tokenizer, split) as path:
        prepared = read_cache(path) if path else None
        if prepared is None:
            prepared = prepare_examples(config, tokenizer, split)
            if path:
                write_cache(path, *prepared)
                prepared = read_cache(path) or prepared  # which gives the memory back
    examples, report = prepared
    if not examples and (report.rows or getattr(config.data, split)):
        longest = longest_example(config, tokenizer)
        name = "max_seq_len" if longest == config.max_seq_len else "the base's context"
        too_long = f"{len(report.dropped)} are longer than {name}={longest}"
        reason = report.skipped[0] if report.skipped else too_long
        raise ConfigError(f"data.{split}: no example is left ({reason})")
    return examples, report


def prepare_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], DatasetReport]:
    """The examples of a split, made from its sources, without the cache.

    Raises ConfigError for a bad row where data.on_error is stop, and for a long example where
    data.overlong is error, for a patient's identifiers where data.identifiers is error, and where
    the tokenizer can write no note as it is.
    """
    conversations, bad_rows = read_split(config, split)
    examples: list[Example] = []
    report = DatasetReport(
        rows=len(conversations) + len(bad_rows),
        kept=0,
        skipped=bad_rows,
        dropped=[],
        truncated=[],
        without_headings=0,
        plain_template=str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE),
        headings=soap.heading_list(config.task),
    )
    longest = longest_example(config, tokenizer)
    limit = f"max_seq_len={config.max_seq_len}; raise it"
    if longest < config.max_seq_len:
        limit = f"the base's context of {longest} tokens; take a base with a longer one"
    seen: set[bytes] = set()
    for conversation, encoded in _encode_all(tokenizer, conversations, config, split):
        if isinstance(encoded, str):
            report.skipped.append(encoded)
            continue
        example = encoded.example
        if len(example) > longest:
            if config.data.overlong == "error":
                raise ConfigError(
                    f"data.{split}, id {example.id}: {len(example)} tokens, more than {limit}, "
                    "or set data.overlong to drop or truncate_dialogue"
                )
            shorter = None
            if config.data.overlong == "truncate_dialogue":
                shorter = shorten_to_fit(tokenizer, conversation, config)
            if shorter is None:
                report.dropped.append(example.id)
                continue
            report.truncated.append(example.id)
            example = shorter
        report.without_headings += encoded.lacks_headings
        report.with_markup += encoded.has_markup
        report.notes_normalized += conversation.headings_changed > 0
        report.headings_normalized += conversation.headings_changed
        if encoded.changed:
            report.notes_changed.append(example.id)
        report.notes_lost += encoded.changed == "lost"
        report.duplicates += _is_repeated(example, seen)
        for kind in encoded.identifiers:
            report.identifiers.setdefault(kind, []).append(example.id)
        examples.append(example)
    report.kept = len(examples)
    _check_report(examples, report, config, split)
    return examples, report


def _check_report(
    examples: list[Example], report: DatasetReport, config: Config, split: str
) -> None:
    """Raises ConfigError for what all examples together show, before anything is cached."""
    if examples and report.notes_lost == len(examples):
        raise ConfigError(
            f"base={config.base}: its tokenizer can write none of the notes of data.{split} as "
            f"they are, first id {examples[0].id}: it changes letters or leaves some out; take "
            "another base"
        )
    if report.identifiers and config.data.identifiers == "error":
        counts = ", ".join(f"{len(ids)} with a {kind}" for kind, ids in report.identifiers.items())
        first = next(iter(report.identifiers.values()))[0]
        raise ConfigError(
            f"data.{split}: {counts}, first id {first}: remove them from the texts, "
            "or set data.identifiers=warn"
        )


def longest_example(config: Config, tokenizer) -> int:
    """The tokens that an example may have: those of max_seq_len, or of the base's context."""
    return min(config.max_seq_len, tokenizer.model_max_length)


def _is_repeated(example: Example, seen: set[bytes]) -> bool:
    """Whether an example with the same tokens is in `seen`, where it is from now on."""
    key = hashlib.blake2b(example.input_ids.tobytes(), digest_size=16).digest()
    repeated = key in seen
    seen.add(key)
    return repeated


class Encoded(NamedTuple):
    """What is found about a conversation on its own."""

    example: Example
    changed: str  # what the tokenizer does to the note, as `note_change` says it
    lacks_headings: bool
    has_markup: bool
    identifiers: list[str]  # the kinds in its texts


def _encode_all(
    tokenizer, conversations: list[Conversation], config: Config, split: str
) -> Iterator[tuple[Conversation, Encoded | str]]:
    """Each conversation with its example, in order, or with why it has none.

    The list is empty afterwards.
    """
    chunks = in_chunks(conversations)
    conversations.clear()
    encode = functools.partial(_encode_chunk, tokenizer, config, split)
    for number, encoded in enumerate(map_chunks(encode, chunks)):
        yield from zip(chunks[number], encoded)
        chunks[number] = []  # the text is given back when its tokens are there


def _encode_chunk(
    tokenizer, config: Config, split: str, conversations: list[Conversation]
) -> list[Encoded | str]:
    """Each conversation's example; where data.on_error is skip, a line for a chat that has none."""
    try:
        return [*_encode_accepted(tokenizer, config, split, conversations)]
    except RefusedChatError as error:
        if config.data.on_error == "stop":
            raise ConfigError(
                f"data.{split}, {error} (data.on_error=skip leaves such chats out and lists them)"
            ) from error
        if len(conversations) == 1:
            return [f"data.{split}, {error}"]
    return [
        encoded
        for conversation in conversations
        for encoded in _encode_chunk(tokenizer, config, split, [conversation])
    ]


def _encode_accepted(
    tokenizer, config: Config, split: str, conversations: list[Conversation]
) -> list[Encoded]:
    """Raises RefusedChatError for the first chat that the base's template refuses."""
    looks = split == "train" and config.data.identifiers != "off"
    found = []
    examples = encode_examples(tokenizer, conversations, config.data.supervise)
    answers = [answer_ids(example) for example in examples]
    written = tokenizer.batch_decode(answers, skip_special_tokens=True)
    for conversation, example, text in zip(conversations, examples, written):
        note = conversation.note
        changed = ""
        if note is not None and config.data.supervise == "note":
            changed = note_change(note, text)
        lacks = note is not None and not soap.has_all_sections(note, config.task)
        text = dialogue_text(conversation) + "\n" + note_text(conversation)
        markup = MARKUP.search(text) is not None
        kinds = find_identifiers(text) if looks else []
        found.append(Encoded(example, changed, lacks, markup, kinds))
    return found


def answer_ids(example: Example) -> np.ndarray:
    """The supervised tokens of an example."""
    return example.input_ids[example.labels != IGNORE]


def note_change(note: str, written: str) -> str:
    """What becomes of a note that a model writes in its own tokens, whatever it has learnt.

    "": nothing; "changed": white space, or compatible characters (NFKC), are others; "lost": more.

    written: the note's tokens as a text.
    """
    if written.strip() == note.strip():
        return ""
    same = _compatible(written) == _compatible(note)
    return "changed" if same else "lost"


def _compatible(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def shorten_to_fit(tokenizer, conversation: Conversation, config: Config) -> Example | None:
    """The example with as few turns removed from the middle of its dialogue as make it fit.

    The note and the prompt's frame stay complete. None where even the first and the last turn are
    too long, and for a row of messages, which has no dialogue.

    conversation: the row, longer than `longest_example` allows.
    """
    if not conversation.dialogue:
        return None

    def encode_with(dialogue: str) -> Example:
        note, fields = conversation.note, conversation.fields
        messages = soap.soap_messages(dialogue, note, config.task, fields)
        shorter = dataclasses.replace(conversation, messages=messages)
        return encode_examples(tokenizer, [shorter], config.data.supervise)[0]

    fitted = soap.fit_dialogue(
        conversation.dialogue,
        lambda dialogue: len(encode_with(dialogue)),
        longest_example(config, tokenizer),
    )
    if fitted is None:
        return None
    dialogue, _ = fitted
    return encode_with(dialogue)


def visit_weights(examples: list[Example]) -> np.ndarray | None:
    """How often an epoch visits each example, float [n]; None where all are visited once."""
    weights = np.array([e.weight for e in examples])
    return None if (weights == 1).all() else weights
