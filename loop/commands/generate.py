"""`generate`: the notes of one dialogue, or of a file of dialogues."""

import argparse
import contextlib
import functools
import signal
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..distributed.world import on_gpu
from ..generation.decode import ROWS, Note, generate_notes, generate_with_headings, sampling
from ..generation.loading import fit_dialogues, generation_source, load_for_generation, prompt_ids
from ..generation.notes_file import NotesFile, digest, read_dialogues
from ..model.loading import load_model_config, load_tokenizer
from ..monitor.quiet import quiet_libraries

# Options that change a note; another adapter or base does so, too.
NOTE_OPTIONS = ("max_new_tokens", "temperature", "top_p", "seed", "strict")
MOST_SHOWN = 8  # ids in a warning


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.sh generate",
        description="Write the SOAP notes of dialogues. They are drafts for a clinician.",
    )
    add = parser.add_argument
    add("--adapter", help="a run's adapter/ folder; without it the base answers alone")
    add("--base", help="the base, where it is not the one the adapter names")
    add("--dialogue", default="-", help="a text file with the dialogue, or - for standard input")
    add("--input", help="a JSONL file with `dialogue` and `id`")
    add("--output", help="the JSONL file for its notes; an unfinished one is resumed")
    add("--max-new-tokens", type=int, default=600, help="longest note")
    add("--batch-size", type=int, default=ROWS, help="dialogues at a time")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0, the default, takes the most likely token",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="with a temperature: draw from the most likely tokens that have this probability "
        "together",
    )
    add("--seed", type=int, default=0, help="with a temperature: another seed, other notes")
    add("--strict", action="store_true", help="force the four headings, and nothing else")
    return parser


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command's options. Raises ConfigError where they make no sense."""
    args = build_parser().parse_args(argv)
    in_range = {
        "max_new_tokens": args.max_new_tokens > 0,
        "batch_size": args.batch_size > 0,
        "temperature": args.temperature >= 0,
        "top_p": 0 < args.top_p <= 1,
        "seed": args.seed >= 0,
    }
    for name, good in in_range.items():
        if not good:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: out of range")
    if not args.temperature and (args.top_p != 1 or args.seed):
        raise ConfigError("--top-p and --seed: mean something only with --temperature above 0")
    if bool(args.input) != bool(args.output) or (args.input and args.dialogue != "-"):
        raise ConfigError("give --input FILE.jsonl and --output FILE.jsonl, or --dialogue FILE")
    return args


def read_dialogue(path: str) -> str:
    """The dialogue of a text file, or of standard input for "-". Raises ConfigError."""
    try:
        dialogue = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--dialogue {path}: {reason}") from error
    if not dialogue.strip():
        raise ConfigError(f"--dialogue {path}: the dialogue is empty")
    return dialogue


def open_output(args: argparse.Namespace, dialogues: dict[str, str], source: dict) -> NotesFile:
    """The output file, whose lines tell what made them. source: of `generation_source`."""
    made_by: dict[str, Any] = {
        "adapter": None,
        "base": source["base"],
        "revision": source["revision"],
    }
    if args.adapter:
        weights = Path(args.adapter) / "adapter_model.safetensors"
        made_by["adapter"] = digest(weights.read_bytes())
    made_by |= {name: getattr(args, name) for name in NOTE_OPTIONS}
    return NotesFile(args.output, dialogues, made_by)


def write_batch(
    model, tokenizer, keys: list[str], dialogues: list[str], args: argparse.Namespace
) -> list[Note]:
    """The notes of some dialogues, as the options say. keys: the dialogues' ids."""

    def logits_processor(section: str = ""):
        if not args.temperature:
            return None
        note_keys = [f"{key} {section}" for key in keys]
        return sampling(args.temperature, args.top_p, args.seed, note_keys)

    if args.strict:
        return generate_with_headings(
            model, tokenizer, dialogues, args.max_new_tokens, logits_processor
        )
    prompts = [prompt_ids(tokenizer, dialogue) for dialogue in dialogues]
    return generate_notes(
        model, tokenizer, prompts, args.max_new_tokens, logits_processor=logits_processor()
    )


def write_file(
    dialogues: dict[str, tuple[str, int]], output: NotesFile, load, args: argparse.Namespace
) -> None:
    """Writes the notes that the output lacks, in batches of like length, and closes it.

    Args:
        dialogues: of `fit_dialogues`.
        output: the file.
        load: gives (model, tokenizer); it is not called where no note is missing.
        args: the command's options.
    """
    missing = [key for key in dialogues if key not in output.done]
    missing.sort(key=lambda key: len(dialogues[key][0]))
    bar = tqdm(total=len(dialogues), initial=len(output.done), unit="note", dynamic_ncols=True)
    with contextlib.closing(output), bar:
        model, tokenizer = load() if missing else (None, None)
        for start in range(0, len(missing), args.batch_size):
            keys = missing[start : start + args.batch_size]
            texts = [dialogues[key][0] for key in keys]
            notes = write_batch(model, tokenizer, keys, texts, args)
            for key, note in zip(keys, notes):
                turns_left_out = dialogues[key][1]
                output.add(key, note, turns_left_out)
                bar.update()


def warn_of_shortened(dialogues: dict[str, tuple[str, int]], context: int) -> None:
    """One line on stderr about dialogues that lost turns, if any did."""
    shortened = [key for key, (_, turns_left_out) in dialogues.items() if turns_left_out]
    if shortened:
        more = " ..." if len(shortened) > MOST_SHOWN else ""
        print(
            f"{len(shortened)} of {len(dialogues)} dialogues had turns left out of their middle "
            f"to fit {context:,} tokens: {', '.join(shortened[:MOST_SHOWN])}{more}",
            file=sys.stderr,
        )


def generate(args: argparse.Namespace) -> None:
    """Does what the options say. Raises ConfigError."""
    if args.input:
        dialogues = read_dialogues(args.input)
    else:
        dialogues = {args.dialogue: read_dialogue(args.dialogue)}
    source = generation_source(args.adapter, args.base)
    output = open_output(args, dialogues, source) if args.output else None
    tokenizer = load_tokenizer(source["base"], source["revision"])
    model_config = load_model_config(source["base"], source["revision"])
    context = model_config.max_position_embeddings
    fitted = fit_dialogues(tokenizer, dialogues, context, args.max_new_tokens)
    warn_of_shortened(fitted, context)
    device = "cuda:0" if on_gpu() else "cpu"
    load = functools.partial(load_for_generation, args.adapter, args.base, device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if output:
        write_file(fitted, output, load, args)
        cut_off = sum(not row["ended"] for row in output.done.values())
        ending = f", {cut_off} of them cut off at --max-new-tokens" if cut_off else ""
        print(f"{len(fitted)} notes in {args.output}{ending}")
    else:
        ((key, (dialogue, _)),) = fitted.items()
        model, tokenizer = load()
        (note,) = write_batch(model, tokenizer, [key], [dialogue], args)
        with contextlib.suppress(BrokenPipeError):
            print(note.text)


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    try:
        args = parse_options(argv)
        generate(args)
    except ConfigError as error:
        exit_with_config_error(error)
    except KeyboardInterrupt:
        if args.output:
            print(
                f"stopped; the notes so far are in {args.output}, and the same command goes on",
                file=sys.stderr,
            )
        sys.exit(130)


if __name__ == "__main__":
    main()
