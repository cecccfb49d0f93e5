"""`./launch.sh preview`: the exact tokens that will be trained on, before anything is trained, and three checks of all of them."""

import html
import os
import sys
from pathlib import Path

import numpy as np

from ..config.cli import load_config, take_options
from ..config.schema import ConfigError
from ..data.batch_plan import PackingSpec, plan_batches, split_step
from ..data.conversations import Conversation, read_split
from ..data.dataset import load_examples, visit_weights
from ..data.tokenization import IGNORE, Example, encode
from ..distributed.exit import exit_with_config_error, ignore_broken_pipe
from ..model.loading import load_tokenizer
from ..monitor.quiet import quiet_libraries

GREEN, DIM, BOLD, RESET = "\033[32m", "\033[2m", "\033[1m", "\033[0m"
COLORS = ("31", "32", "33", "34", "35", "36")  # of a packed row's documents, in turn
STYLE = """body{font:14px/1.7 monospace;max-width:110em;margin:2em auto;white-space:pre-wrap;color:#666}h2{font-size:1em;color:#000}
i{font-style:normal;border-right:1px solid #ddd}.on{color:#063;background:#dfd}.special{font-weight:bold;color:#a00}
.d0{background:#fde}.d1{background:#def}.d2{background:#efd}.d3{background:#fed}.d4{background:#edf}.d5{background:#dfe}"""


def pieces(example: Example, tokenizer) -> list[tuple[str, bool, bool]]:
    """(text, supervised, special) of every token; a line break is shown as \\n and broken."""
    specials, found = set(tokenizer.all_special_tokens), []
    for token, label in zip(
        tokenizer.convert_ids_to_tokens(example.input_ids.tolist()), example.labels
    ):
        text = token if token in specials else tokenizer.convert_tokens_to_string([token]) or " "
        found.append((text.replace("\n", "\\n\n"), bool(label != IGNORE), token in specials))
    return found


def show_example(example: Example, tokenizer, color: bool) -> str:
    """Tokens with a bar between them; supervised ones green, or in [brackets] without colour; special ones bold."""
    parts = []
    for text, supervised, special in pieces(example, tokenizer):
        style = (BOLD if special else "") + (GREEN if supervised else DIM)
        parts.append(f"{style}{text}{RESET}" if color else f"[{text}]" if supervised else text)
    return "|".join(parts)


def documents_of(row: list[Example], tokenizer) -> list[tuple[str, str]]:
    """(place in the packed row and positions, text) of each document."""
    ends = np.cumsum([len(e) for e in row])
    heads = [
        f"document {i}: id {e.id}, tokens {end - len(e):,} to {end - 1:,} of the row, positions 0 to {len(e) - 1:,}"
        for i, (e, end) in enumerate(zip(row, ends))
    ]
    return list(zip(heads, (tokenizer.decode(e.input_ids) for e in row)))


def show_row(row: list[Example], tokenizer, color: bool) -> str:
    """A packed row, each document in its own colour."""
    shown = (f"{head}\n{text}" for head, text in documents_of(row, tokenizer))
    return "\n".join(
        f"\033[{COLORS[i % 6]}m{text}{RESET}" if color else text for i, text in enumerate(shown)
    )


def as_html(examples: list[Example], rows: list[list[Example]], tokenizer) -> str:
    """The same as a page that needs nothing else."""
    body = [
        'tokens between bars; <i class="on">supervised</i>, <i class="special">special</i>; a colour a document in a packed row'
    ]
    for e in examples:
        tokens = "".join(
            f'<i class="{"on " * on}{"special" * special}">{html.escape(text)}</i>'
            for text, on, special in pieces(e, tokenizer)
        )
        body.append(f"<h2>{html.escape(head_of(e))}</h2>{tokens}")
    for number, row in enumerate(rows):
        body.append(f"<h2>packed row {number}: {sum(map(len, row)):,} tokens</h2>")
        body += [
            f'<div class="d{i % 6}"><b>{html.escape(head)}</b>\n{html.escape(text)}</div>'
            for i, (head, text) in enumerate(documents_of(row, tokenizer))
        ]
    return (
        f'<!doctype html><meta charset="utf-8"><title>what is trained on</title><style>{STYLE}</style>'
        + "\n".join(body)
    )


def head_of(e: Example) -> str:
    return f"{e.id}: {len(e):,} tokens, {len(e) - e.num_targets:,} of the prompt, {e.num_targets:,} supervised"


def check_examples(
    examples: list[Example], conversations: dict[str, Conversation], tokenizer, truncated: set[str]
) -> list[str]:
    """What holds for all examples, a line each. Raises ConfigError with the first id for which it doesn't."""
    prompts = encode(
        tokenizer,
        [
            (conversations[e.id].messages[:-1], True)
            for e in examples
            if conversations[e.id].note is not None
        ],
    )
    checked, following = 0, iter(prompts)
    for e in examples:
        if e.labels[-1] != tokenizer.eos_token_id:
            raise ConfigError(
                f"id {e.id}: the answer does not end in a supervised {tokenizer.eos_token!r}"
            )
        note = conversations[e.id].note
        if note is None:  # several turns: their spans are not the note of a prompt
            continue
        prompt = next(following)
        if e.id not in truncated and (
            e.input_ids[: len(prompt)].tolist() != prompt
            or (e.labels[: len(prompt)] != IGNORE).any()
        ):
            raise ConfigError(
                f"id {e.id}: what generation would be fed is not what training has before the note"
            )
        if (
            tokenizer.decode(e.input_ids[e.labels != IGNORE], skip_special_tokens=True).strip()
            != note.strip()
        ):
            raise ConfigError(
                f"id {e.id}: the supervised tokens do not decode to the note; this tokenizer changes text"
            )
        checked += 1
    return [
        f"every answer ends in a supervised {tokenizer.eos_token!r} ({len(examples):,} examples)",
        f"the prompt of generation is an exact prefix of the tokens; the supervised ones decode to the note ({checked:,} examples)",
    ]


@ignore_broken_pipe()
def main(argv: list[str] | None = None) -> None:
    """`preview [--rows N | --id ID | --step S] [--html FILE] [--config FILE] [key=value ...]`"""
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        options = take_options(args, {"--rows": "1", "--id": None, "--step": None, "--html": None})
        if not options["--rows"].isdigit() or options["--rows"] == "0":
            raise ConfigError(f"--rows {options['--rows']}: must be a whole number of at least 1")
        config = load_config(args)
        tokenizer = load_tokenizer(config.base, config.revision)
        examples, account = load_examples(config, tokenizer, "train")
        chosen = (
            examples[: int(options["--rows"])]
            if options["--id"] is None
            else [e for e in examples if e.id == options["--id"]]
        )
        if not chosen:
            raise ConfigError(
                f"--id {options['--id']}: no such example in data.train, or it was left out (see ./launch.sh plan)"
            )
        rows = []
        if options["--step"] is not None:
            lengths = np.array([len(e) for e in examples])
            plan = plan_batches(
                lengths,
                config.tokens_per_step,
                config.seed,
                config.epochs,
                config.max_steps,
                visit_weights(examples),
            )
            if not options["--step"].isdigit() or int(options["--step"]) >= len(plan):
                raise ConfigError(
                    f"--step {options['--step']}: must be a whole number below {len(plan)}"
                )
            size = (
                config.batch_size if config.micro_batch_size == "auto" else config.micro_batch_size
            )
            packing = PackingSpec(size * config.max_seq_len, config.max_seq_len)
            (mine,) = split_step(plan[int(options["--step"])], lengths, 1, packing)
            chosen, rows = [], [[examples[i] for i in part] for part in mine]
        conversations = {c.id: c for c in read_split(config, "train")[0]}
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for e in chosen:
            print(f"{head_of(e)}\n{show_example(e, tokenizer, color)}\n")
        for number, row in enumerate(rows):
            print(
                f"packed row {number}: {sum(map(len, row)):,} tokens\n{show_row(row, tokenizer, color)}\n"
            )
        if options["--html"]:
            page = Path(options["--html"])
            try:
                page.touch(0o600)  # its text may be a patient's
                page.chmod(0o600)
                page.write_text(as_html(chosen, rows, tokenizer))
            except OSError as error:
                raise ConfigError(f"--html {page}: {error.strerror}") from error
            print(f"written to {page}")
        print("\n".join(check_examples(examples, conversations, tokenizer, set(account.truncated))))
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
