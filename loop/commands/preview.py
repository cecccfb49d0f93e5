"""`./launch.sh preview`: the exact tokens that will be trained on, shown before any training.

It shows examples token by token or the packed rows of a step, in the terminal and as a page. Then
it checks all examples: their end, their prompt and their note.
"""

import html
import os
import sys
from pathlib import Path

import numpy as np

from ..config.cli import load_config, printable, take_options
from ..config.schema import Config, ConfigError
from ..data.batch_plan import PackingSpec, plan_run, split_step
from ..data.conversations import Conversation, read_split
from ..data.dataset import load_examples, visit_weights
from ..data.tokenization import IGNORE, Example, encode
from ..distributed.exit import exit_with_config_error
from ..distributed.files import check_writable
from ..distributed.hosts import is_number
from ..model.loading import load_tokenizer
from ..monitor.quiet import quiet_libraries

GREEN, DIM, BOLD, RESET = "\033[32m", "\033[2m", "\033[1m", "\033[0m"
COLORS = ("31", "32", "33", "34", "35", "36")  # of a packed row's documents, in turn
STYLE = """
body{font:14px/1.7 monospace;max-width:110em;margin:2em auto;white-space:pre-wrap;color:#666}
h2{font-size:1em;color:#000}
i{font-style:normal;border-right:1px solid #ddd}
.on{color:#063;background:#dfd}
.special{font-weight:bold;color:#a00}
.d0{background:#fde}.d1{background:#def}.d2{background:#efd}
.d3{background:#fed}.d4{background:#edf}.d5{background:#dfe}
"""


def display_tokens(example: Example, tokenizer) -> list[tuple[str, bool, bool]]:
    """(text, supervised, special) of every token. A line break is shown as \\n and broken."""
    specials = set(tokenizer.all_special_tokens)
    shown = []
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    for token, label in zip(tokens, example.labels):
        special = token in specials
        text = token if special else tokenizer.convert_tokens_to_string([token]) or " "
        shown.append((text.replace("\n", "\\n\n"), bool(label != IGNORE), special))
    return shown


def describe_example(example: Example) -> str:
    """The id of an example and its numbers of tokens, in one line."""
    prompt = len(example) - example.num_targets
    return (
        f"{example.id}: {len(example):,} tokens, {prompt:,} of the prompt, "
        f"{example.num_targets:,} supervised"
    )


def show_example(example: Example, tokenizer, color: bool) -> str:
    """The tokens of an example with a bar between them.

    Supervised ones are green, or in [brackets] without colour; special ones are bold.
    """
    parts = []
    for text, supervised, special in display_tokens(example, tokenizer):
        if color:
            style = (BOLD if special else "") + (GREEN if supervised else DIM)
            parts.append(f"{style}{text}{RESET}")
        else:
            parts.append(f"[{text}]" if supervised else text)
    return "|".join(parts)


def describe_documents(row: list[Example], tokenizer) -> list[tuple[str, str]]:
    """(where it lies in the packed row, text) of each document of a row."""
    documents = []
    start = 0
    for i, example in enumerate(row):
        end = start + len(example)
        where = (
            f"document {i}: id {example.id}, tokens {start:,} to {end - 1:,} of the row, "
            f"positions 0 to {len(example) - 1:,}"
        )
        documents.append((where, tokenizer.decode(example.input_ids)))
        start = end
    return documents


def show_row(row: list[Example], tokenizer, color: bool) -> str:
    """The documents of a packed row, each in its own colour."""
    documents = [f"{where}\n{text}" for where, text in describe_documents(row, tokenizer)]
    if color:
        documents = [f"\033[{COLORS[i % 6]}m{text}{RESET}" for i, text in enumerate(documents)]
    return "\n".join(documents)


def as_html(examples: list[Example], rows: list[list[Example]], tokenizer) -> str:
    """Examples and packed rows as a page that loads nothing else."""
    body = [
        'tokens between bars; <i class="on">supervised</i>, <i class="special">special</i>; '
        "a colour a document in a packed row"
    ]
    for example in examples:
        tokens = []
        for text, supervised, special in display_tokens(example, tokenizer):
            classes = ("on " if supervised else "") + ("special" if special else "")
            tokens.append(f'<i class="{classes}">{html.escape(text)}</i>')
        body.append(f"<h2>{html.escape(describe_example(example))}</h2>{''.join(tokens)}")
    for number, row in enumerate(rows):
        body.append(f"<h2>packed row {number}: {sum(map(len, row)):,} tokens</h2>")
        for i, (where, text) in enumerate(describe_documents(row, tokenizer)):
            head = f"<b>{html.escape(where)}</b>"
            body.append(f'<div class="d{i % 6}">{head}\n{html.escape(text)}</div>')
    head = f'<meta charset="utf-8"><title>what is trained on</title><style>{STYLE}</style>'
    return f"<!doctype html>{head}" + "\n".join(body)


def write_html(page: Path, text: str) -> None:
    """Writes a page that only its owner can read: its text may be a patient's."""
    try:
        page.touch(0o600)
        page.chmod(0o600)
        page.write_text(text)
    except OSError as error:
        raise ConfigError(f"--html {page}: {error.strerror}") from error


def check_examples(
    examples: list[Example], conversations: dict[str, Conversation], tokenizer, truncated: set[str]
) -> list[str]:
    """Checks all examples and returns what holds, a line each.

    Raises ConfigError with the first id for which it does not hold.

    Args:
        conversations: by id, of all examples.
        truncated: ids of examples whose dialogue was shortened. Their prompts are not compared.
    """
    # A conversation of several turns has no note: its supervised spans are not a prompt's answer.
    with_note = [e.id for e in examples if conversations[e.id].note is not None]
    prompts = iter(encode(tokenizer, [(conversations[i].messages[:-1], True) for i in with_note]))
    for example in examples:
        if example.labels[-1] != tokenizer.eos_token_id:
            raise ConfigError(
                f"id {example.id}: the answer does not end in a supervised {tokenizer.eos_token!r}"
            )
        note = conversations[example.id].note
        if note is not None:
            prompt = next(prompts)
            if example.id not in truncated:
                check_prompt(example, prompt)
            check_note(example, note, tokenizer)
    return [
        f"every answer ends in a supervised {tokenizer.eos_token!r} ({len(examples):,} examples)",
        "the prompt of generation is an exact prefix of the tokens; the supervised ones decode to "
        f"the note ({len(with_note):,} examples)",
    ]


def check_prompt(example: Example, prompt: list[int]) -> None:
    """Raises ConfigError unless the example begins with `prompt`, unsupervised."""
    same = example.input_ids[: len(prompt)].tolist() == prompt
    if not same or (example.labels[: len(prompt)] != IGNORE).any():
        raise ConfigError(
            f"id {example.id}: what generation would be fed is not what training has "
            "before the note"
        )


def check_note(example: Example, note: str, tokenizer) -> None:
    """Raises ConfigError unless the supervised tokens decode to `note`."""
    supervised = example.input_ids[example.labels != IGNORE]
    if tokenizer.decode(supervised, skip_special_tokens=True).strip() != note.strip():
        raise ConfigError(
            f"id {example.id}: the supervised tokens do not decode to the note; "
            "this tokenizer changes text"
        )


def select_examples(examples: list[Example], options: dict) -> list[Example]:
    """The example that --id names, or the first --rows examples."""
    if options["--id"] is None:
        return examples[: int(options["--rows"])]
    selected = [e for e in examples if e.id == options["--id"]]
    if not selected:
        raise ConfigError(
            f"--id {options['--id']}: no such example in data.train, or it was left out "
            "(see ./launch.sh plan)"
        )
    return selected


def pack_step(examples: list[Example], step: str, config: Config) -> list[list[Example]]:
    """The packed rows of a step of the run on one rank. step: as it was typed."""
    lengths = np.array([len(e) for e in examples])
    plan = plan_run(config, lengths, visit_weights(examples))
    if not is_number(step) or int(step) >= len(plan):
        raise ConfigError(f"--step {step}: must be a whole number below {len(plan)}")
    size = config.micro_batch_size
    if size == "auto":
        size = config.batch_size
    packing = PackingSpec(size * config.max_seq_len, config.max_seq_len)
    (micro_batches,) = split_step(plan[int(step)], lengths, 1, packing)
    return [[examples[i] for i in ids] for ids in micro_batches]


def show(examples: list[Example], rows: list[list[Example]], tokenizer) -> None:
    """Prints examples and packed rows, in colour on a terminal."""
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in examples:
        print(f"{describe_example(example)}\n{show_example(example, tokenizer, color)}\n")
    for number, row in enumerate(rows):
        print(f"packed row {number}: {sum(map(len, row)):,} tokens")
        print(f"{show_row(row, tokenizer, color)}\n")


def preview(args: list[str]) -> None:
    """Raises ConfigError for a mistake in `args`, or where an example fails a check."""
    options = take_options(args, {"--rows": "1", "--id": None, "--step": None, "--html": None})
    if not is_number(options["--rows"]) or int(options["--rows"]) == 0:
        raise ConfigError(
            f"--rows {printable(options['--rows'])}: must be a whole number of at least 1"
        )
    if options["--html"]:
        check_writable("--html", Path(options["--html"]))
    config = load_config(args)
    tokenizer = load_tokenizer(config.base, config.revision)
    examples, report = load_examples(config, tokenizer, "train")
    selected = select_examples(examples, options)
    rows: list[list[Example]] = []
    if options["--step"] is not None:
        selected = []
        rows = pack_step(examples, options["--step"], config)
    conversations = {c.id: c for c in read_split(config, "train")[0]}
    show(selected, rows, tokenizer)
    if options["--html"]:
        page = Path(options["--html"])
        write_html(page, as_html(selected, rows, tokenizer))
        print(f"written to {page}")
    print("\n".join(check_examples(examples, conversations, tokenizer, set(report.truncated))))


def main(argv: list[str] | None = None) -> None:
    """`preview [--rows N | --id ID | --step S] [--html FILE] [--config FILE] [key=value ...]`"""
    quiet_libraries()
    try:
        preview(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
