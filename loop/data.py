"""From files to checked examples: token ids, and labels that supervise the note, its end-of-sequence token included, and nothing else."""

import dataclasses
import re
import tempfile
from pathlib import Path

import datasets
import jinja2
import numpy as np

from .config import ROOT, Config, ConfigError
from .soap import soap_messages

SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # our name -> the hub's usual name
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
IGNORE = -100  # the label of a token that is not supervised, as everywhere in the field

# For a base that brings no chat template of its own.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation. A label is the token itself where it is supervised, otherwise -100."""

    id: str
    input_ids: np.ndarray  # int32 [L]
    labels: np.ndarray  # int32 [L]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Supervised tokens. The first token of a document has no predecessor that could predict it."""
        return int((self.labels[1:] != IGNORE).sum())


def load_rows(source: str, split: str) -> tuple[datasets.Dataset, str]:
    """Rows of one source and the split's name. `source` is a file, a folder in the hub's layout or a hub id, each with an
    optional `:SPLIT`. Raises ConfigError naming the source when it can't be read."""
    name, wanted = (source, "") if ":" not in source or Path(source).exists() else source.rsplit(":", 1)
    wanted = wanted or SPLITS[split]
    path = Path(name) if Path(name).exists() else ROOT / name  # what the repository ships is found from any folder
    if path.suffix in READERS and not path.is_file():
        raise ConfigError(f"data.{split}={source}: no such file")
    try:
        # The cache would keep a copy of patients' dialogues in the home folder; a temporary one goes with this block.
        with tempfile.TemporaryDirectory() as cache:
            if path.suffix in READERS:
                read = {"path": READERS[path.suffix], "data_files": {wanted: str(path)}, "cache_dir": cache}
                return datasets.load_dataset(**read, split=wanted, keep_in_memory=True), wanted
            if path.is_dir():
                return datasets.load_dataset(str(path), split=wanted, cache_dir=cache, keep_in_memory=True), wanted
        return datasets.load_dataset(name, split=wanted), wanted
    except Exception as error:  # each reader has its own exceptions; their root cause says what and where
        while error.__cause__ is not None:
            error = error.__cause__
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        remedy = "repair the file" if path.exists() else "no such file or folder, and the hub has no answer; point it at a local file or folder"
        raise ConfigError(f"data.{split}={source}: {remedy} ({reason})") from error


def read_conversations(config: Config, split: str) -> list[tuple[str, list[dict[str, str]]]]:
    """The (id, messages) of a split, each row checked: columns there, texts of type str, none empty, ids unique.
    Raises ConfigError that names source and row, never a patient's words."""
    sources = getattr(config.data, split)
    columns = config.data.columns
    found: dict[str, list[dict[str, str]]] = {}
    for source in [sources] if isinstance(sources, str) else sources or []:
        rows, name = load_rows(source, split)
        needed = [columns["messages"]] if "messages" in columns else [columns["dialogue"], columns["note"]]
        ids = columns.get("id", "id")
        for column in needed if ids == "id" else [*needed, ids]:  # without a column "id", rows are numbered
            if column not in rows.column_names:
                raise ConfigError(f"data.columns: {source} has no column {column!r}, only {', '.join(rows.column_names)}")
        for number, row in enumerate(rows.select(range(min(len(rows), config.data.limit or len(rows))))):
            key = row.get(ids)
            key = f"{name}-{len(found)}" if key is None else str(key)
            where = f"{source}, row {number + 1} (id {key})"
            if key in found:
                raise ConfigError(f"{where}: this id occurs twice; make ids unique")
            if "messages" in columns:
                messages = row[columns["messages"]]
                whole = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
                if not whole or not any(m.get("role") == "assistant" for m in messages):
                    raise ConfigError(f"{where}: {columns['messages']} must be a list of role and content with an assistant's turn")
            else:
                for column in needed:
                    if not isinstance(row[column], str) or not row[column].strip():
                        raise ConfigError(f"{where}: {column} is {'empty' if isinstance(row[column], str) else 'not a text'}")
                messages = soap_messages(row[columns["dialogue"]], row[columns["note"]])
            found[key] = messages
    return list(found.items())


def encode(tokenizer, conversations: list[tuple[list[dict[str, str]], bool]]) -> list[list[int]]:
    """Token ids of conversations, each (messages, add_generation_prompt), under the tokenizer's chat template. Training and
    generation both come through here.

    Text that spells a special token ("</s>") inside a message stays text: such a conversation is put together from the
    template's frame, where special tokens count, and the contents, where they don't."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    specials = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]

    def render(messages, prompt):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateError as error:  # e.g. a template that knows no system role
            roles = ", ".join(m["role"] for m in messages)
            raise ConfigError(f"the base's chat template refuses a conversation of {roles}: {error}") from error

    texts = [render(*c) for c in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for at, (messages, prompt) in enumerate(conversations):
        if not any(s in m["content"] for s in specials for m in messages):
            continue
        marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        encoded[at] = []
        for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", render(marked, prompt))):
            inside = i % 2 == 1
            piece = messages[int(piece)]["content"] if inside else piece
            encoded[at] += tokenizer(piece, add_special_tokens=False, split_special_tokens=inside)["input_ids"] if piece else []
    return encoded


def encode_examples(tokenizer, conversations: list[tuple[str, list[dict[str, str]]]], supervise: str = "note") -> list[Example]:
    """Tokens and labels of (id, messages) pairs, each up to and including the EOS of its last assistant turn.

    The prompt's tokens are exactly those that generation will feed. Where the template's text tokenises differently as a whole
    (trl#6105), the answer is tokenised on its own behind the prompt. An answer that the template ends without an EOS gets one
    (trl#7230: an EOS never supervised is never learned)."""
    answers = [[t for t, m in enumerate(messages) if m["role"] == "assistant"] for _, messages in conversations]
    if supervise == "all":  # one span from the first token to the last answer's end: no prompt needed
        answers = [turns[-1:] for turns in answers]
    wanted = [(messages[: t + whole], not whole) for (_, messages), turns in zip(conversations, answers) for t in turns
              for whole in ((1,) if supervise == "all" else (0, 1))]  # fmt: skip
    encoded, eos = iter(encode(tokenizer, wanted)), tokenizer.eos_token_id
    examples = []
    for (key, messages), turns in zip(conversations, answers):
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for turn in turns:
            prompt = [] if supervise == "all" else next(encoded)
            whole = next(encoded)
            if whole[: len(prompt)] != prompt:
                whole = prompt + tokenizer(messages[turn]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            answer = whole[len(prompt) :]
            if eos in answer:  # the template's own line break behind the EOS is not part of the answer
                answer = answer[: len(answer) - answer[::-1].index(eos)]
            else:
                answer = [*answer, eos]
            if prompt[: len(ids)] != ids:
                raise ConfigError(f"id {key}: the chat template rewrites earlier turns; train on one turn at a time")
            ids = prompt + answer
            spans.append((len(prompt), len(ids)))
        input_ids = np.asarray(ids, np.int32)
        labels = np.full_like(input_ids, IGNORE)
        for start, end in [(1, len(ids))] if supervise == "all" else spans:
            labels[start:end] = input_ids[start:end]
        examples.append(Example(key, input_ids, labels))
    return examples


def load_examples(config: Config, tokenizer, split: str) -> tuple[list[Example], list[str]]:
    """The examples of a split ("train", "valid", "test") and the ids of those dropped for being longer than max_seq_len."""
    conversations = read_conversations(config, split)
    kept, dropped = [], []
    for start in range(0, len(conversations), 1024):
        for example in encode_examples(tokenizer, conversations[start : start + 1024], config.data.supervise):
            if len(example) <= config.max_seq_len:
                kept.append(example)
            elif config.data.overlong == "drop":
                dropped.append(example.id)
            else:
                raise ConfigError(f"data.{split}, id {example.id}: {len(example)} tokens, more than max_seq_len={config.max_seq_len}; "
                                  "raise it, or set data.overlong=drop")  # fmt: skip
    if not kept and getattr(config.data, split):
        raise ConfigError(f"data.{split}: no example is left ({len(dropped)} are longer than max_seq_len={config.max_seq_len})")
    return kept, dropped
