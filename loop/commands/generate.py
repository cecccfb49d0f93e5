"""Notes from dialogues: `./launch.sh generate --adapter DIR --dialogue FILE`, or thousands with `--input FILE --output FILE`."""

import argparse
import contextlib
import functools
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..distributed.world import on_gpu
from ..generation.decode import ROWS, Note, generate_notes, generate_with_headings, sampling
from ..generation.loading import fit_dialogues, generation_source, load_for_generation, prompt_ids
from ..generation.notes_file import NotesFile, digest, read_dialogues
from ..model.loading import load_model_config, load_tokenizer
from ..monitor.quiet import quiet_libraries


def write_batch(
    model, tokenizer, keys: list[str], dialogues: list[str], args: argparse.Namespace
) -> list[Note]:
    """The notes of some dialogues, as the command's options say."""

    def sampled(part: str = ""):
        return (
            sampling(args.temperature, args.top_p, args.seed, [f"{key} {part}" for key in keys])
            if args.temperature
            else None
        )

    if args.strict:
        return generate_with_headings(model, tokenizer, dialogues, args.max_new_tokens, sampled)
    return generate_notes(
        model,
        tokenizer,
        [prompt_ids(tokenizer, d) for d in dialogues],
        args.max_new_tokens,
        sampled=sampled(),
    )


def read_one(path: str) -> str:
    """The dialogue of a text file, or of standard input for -."""
    try:
        dialogue = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--dialogue {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from error
    if not dialogue.strip():
        raise ConfigError(f"--dialogue {path}: the dialogue is empty")
    return dialogue


def write_file(
    dialogues: dict[str, tuple[str, int]], output: NotesFile, load, args: argparse.Namespace
) -> None:
    """Writes the notes that the output lacks, in batches of like length."""
    keys = sorted(
        (key for key in dialogues if key not in output.done), key=lambda key: len(dialogues[key][0])
    )
    with (
        contextlib.closing(output),
        tqdm(
            total=len(dialogues), initial=len(output.done), unit="note", dynamic_ncols=True
        ) as bar,
    ):
        model, tokenizer = load() if keys else (None, None)
        for start in range(0, len(keys), args.batch_size):
            batch = keys[start : start + args.batch_size]
            for key, note in zip(
                batch,
                write_batch(model, tokenizer, batch, [dialogues[key][0] for key in batch], args),
            ):
                output.add(key, note, dialogues[key][1])
                bar.update()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.sh generate",
        description="Write the SOAP notes of dialogues. They are drafts for a clinician.",
    )
    parser.add_argument(
        "--adapter", help="a run's adapter/ folder; without it the base answers alone"
    )
    parser.add_argument("--base", help="the base, where it is not the one the adapter names")
    parser.add_argument(
        "--dialogue", default="-", help="a text file with the dialogue, or - for standard input"
    )
    parser.add_argument("--input", help="a JSONL file with `dialogue` and `id`")
    parser.add_argument(
        "--output",
        help="the JSONL file for its notes; one that was left unfinished is gone on with",
    )
    parser.add_argument("--max-new-tokens", type=int, default=600, help="longest note")
    parser.add_argument("--batch-size", type=int, default=ROWS, help="dialogues at a time")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="with a temperature: draw from the likeliest tokens that have this share",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with a temperature: another seed, other notes"
    )
    parser.add_argument(
        "--strict", action="store_true", help="force the four headings, and nothing else"
    )
    args = parser.parse_args(argv)
    for name, fine in {
        "max_new_tokens": args.max_new_tokens > 0,
        "batch_size": args.batch_size > 0,
        "temperature": args.temperature >= 0,
        "top_p": 0 < args.top_p <= 1,
        "seed": args.seed >= 0,
    }.items():
        if not fine:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: out of range")
    if not args.temperature and (args.top_p != 1 or args.seed):
        raise ConfigError("--top-p and --seed: mean something only with --temperature above 0")
    if bool(args.input) != bool(args.output) or (args.input and args.dialogue != "-"):
        raise ConfigError("give --input FILE.jsonl and --output FILE.jsonl, or --dialogue FILE")
    return args


def main(argv: list[str] | None = None) -> None:

    quiet_libraries()
    try:
        args = parse(argv)
        dialogues = (
            read_dialogues(args.input) if args.input else {args.dialogue: read_one(args.dialogue)}
        )
        trained, output = generation_source(args.adapter, args.base), None
        if args.output:
            weights = (
                digest((Path(args.adapter) / "adapter_model.safetensors").read_bytes())
                if args.adapter
                else None
            )
            chosen = {
                name: getattr(args, name)
                for name in ("max_new_tokens", "temperature", "top_p", "seed", "strict")
            }
            output = NotesFile(
                args.output,
                dialogues,
                {"adapter": weights, "base": trained["base"], "revision": trained["revision"]}
                | chosen,
            )
        tokenizer, shape = (
            load(trained["base"], trained["revision"])
            for load in (load_tokenizer, load_model_config)
        )
        fitted = fit_dialogues(
            tokenizer, dialogues, shape.max_position_embeddings, args.max_new_tokens
        )
        if shortened := [key for key, (_, turns) in fitted.items() if turns]:
            print(
                f"{len(shortened)} of {len(fitted)} dialogues had turns left out of their middle to fit {shape.max_position_embeddings:,} tokens: "
                + ", ".join(shortened[:8])
                + (" ..." if len(shortened) > 8 else ""),
                file=sys.stderr,
            )
        load = functools.partial(
            load_for_generation, args.adapter, args.base, "cuda:0" if on_gpu() else "cpu"
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if output:
            write_file(fitted, output, load, args)
            cut = sum(not row["ended"] for row in output.done.values())
            print(
                f"{len(fitted)} notes in {args.output}"
                + (f", {cut} of them cut off at --max-new-tokens" if cut else "")
            )
        else:
            ((key, (dialogue, _)),) = fitted.items()
            model, tokenizer = load()
            note = write_batch(model, tokenizer, [key], [dialogue], args)[0].text
            with contextlib.suppress(BrokenPipeError):
                print(note)
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
