"""`generate`: the notes of one dialogue, or of a file of dialogues."""

import argparse
import contextlib
import dataclasses
import functools
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from tqdm import tqdm

from ..config.cli import printable
from ..config.plain_yaml import read_yaml
from ..config.schema import ConfigError, GenerationSettings, TaskConfig, check_path
from ..data.conversations import Question
from ..data.soap import SOAP
from ..data.sources.cells import has_words
from ..data.sources.readers import MAX_ROW_BYTES, decode_text
from ..distributed.exit import exit_process, exit_with_config_error
from ..distributed.world import on_gpu
from ..families.admission import check_vocabulary
from ..generation.candidates import write_best_notes
from ..generation.decode import ROWS, Note
from ..generation.engine import NoteRequest
from ..generation.loading import fit_dialogues, generation_source, load_for_generation, prompt_ids
from ..generation.notes_file import NotesFile, digest, read_questions
from ..generation.prompt import check_prompt, prompt_texts, task_of
from ..generation.sharded import GPU_ROWS
from ..memory.measure import describe_full_gpu
from ..model.loading import load_model_config, load_tokenizer
from ..model.structure import context_length
from ..monitor.quiet import quiet_libraries

OF_SAMPLING = {"top_p": 1, "min_p": 0, "seed": 0, "candidates": 1}  # what has no effect
RENAMED_OPTIONS = {"strict": "forced-headings"}
MOST_SHOWN = 8  # ids in a warning


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.sh generate",
        description="Write the notes of dialogues. They are drafts for a clinician.",
    )
    add = parser.add_argument
    add("--adapter", help="a run's adapter/ folder; without it the base answers alone")
    add("--base", help="the base, where it is not the one the adapter names")
    add("--dialogue", default="-", help="a text file with the dialogue, or - for standard input")
    add("--input", help="a source of dialogues, named as in data.test")
    add("columns", nargs="?", metavar="data.columns=...", help="the names of its columns")
    add("--output", help="the JSONL file for its notes; an unfinished one is resumed")
    add("--field", action="append", default=[], help="NAME=VALUE, for a {NAME} of the request")
    add("--any-prompt", action="store_true", help="even where it was trained with another prompt")
    add("--batch-size", type=int, help="dialogues at a time (default: as many as are good here)")
    # Without these the settings are those of the adapter's run.
    yes_or_no = argparse.BooleanOptionalAction
    add("--max-new-tokens", type=int, help="longest note")
    add("--temperature", type=float, help="0 takes the most likely token")
    add("--top-p", type=float, help="draw from the most likely tokens of this probability together")
    add("--min-p", type=float, help="draw no token below this fraction of the most likely one's")
    add("--seed", type=int, help="another seed, other notes")
    add("--candidates", type=int, help="draw so many, give the one that agrees best")
    add("--no-repeat-ngram", type=int, help="no so many tokens twice in a note")
    add("--end-loops", action=yes_or_no, help="end a note that runs in circles")
    add("--forced-headings", action=yes_or_no, help="force the task's headings, nothing else")
    return parser


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command's options. Raises ConfigError where they make no sense."""
    for old, new in RENAMED_OPTIONS.items():
        if f"--{old}" in (sys.argv if argv is None else argv):
            raise ConfigError(f"--{old} is --{new} now")
    args = build_parser().parse_args(argv)
    for name in ("dialogue", "input", "output"):
        check_path(f"--{name}", getattr(args, name) or "")
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: must be 1 or more")
    # The run's temperature is not known yet.
    check_settings({"temperature": 1.0} | given_settings(args))
    if bool(args.input) != bool(args.output) or (args.input and args.dialogue != "-"):
        raise ConfigError("give --input SOURCE and --output FILE.jsonl, or --dialogue FILE")
    if args.columns and not args.input:
        raise ConfigError(f"{args.columns}: means something only with --input")
    return args


def parse_columns(option: str | None) -> dict | None:
    """The columns of `data.columns={dialogue: NAME}`. Raises ConfigError."""
    if option is None:
        return None
    key, _, value = option.partition("=")
    try:
        columns = read_yaml(value)
    except yaml.YAMLError:
        columns = None
    if key != "data.columns" or not isinstance(columns, dict):
        raise ConfigError(
            f"{printable(option, 80)}: write 'data.columns={{id: NAME, dialogue: NAME}}'"
        )
    return columns


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of GenerationSettings that the command line names, with their values."""
    values = {name: getattr(args, name) for name in GenerationSettings.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def as_option(name: str) -> str:
    """How a key of GenerationSettings is typed."""
    return f"--{name.replace('_', '-')}"


def check_settings(values: dict[str, Any], source: str = "") -> GenerationSettings:
    """The settings with these values. Raises ConfigError naming the option, or the `source`."""
    try:
        return GenerationSettings(**values)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        what = mistake["msg"].removeprefix("Value error, ")
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        where = source or (f"{as_option(name)} {values[name]}" if name else "")
        raise ConfigError(": ".join(filter(None, (where, source and name, what)))) from error


def choose_settings(args: argparse.Namespace, source: dict) -> GenerationSettings:
    """The settings of the adapter's run, changed by the command line's.

    source: of `generation_source`. Raises ConfigError.
    """
    given = given_settings(args)
    trained = source.get("generation") or {}
    named = f"--adapter {args.adapter}" if args.adapter else f"--base {args.base}"
    if not isinstance(trained, dict):
        raise ConfigError(f"{named}: trained.json: generation is not an object")
    check_settings(trained, f"{named}: trained.json: generation")
    values = trained | given
    if not values.get("temperature"):
        idle = [as_option(name) for name, off in OF_SAMPLING.items() if given.get(name, off) != off]
        if idle:
            raise ConfigError(
                f"{' and '.join(idle)}: means something only with --temperature above 0"
            )
        values = {key: v for key, v in values.items() if key not in OF_SAMPLING}
    return check_settings(values)


def read_dialogue(path: str) -> str:
    """The dialogue of a text file, or of standard input for "-". Raises ConfigError."""
    try:
        if path == "-":
            content = sys.stdin.read(MAX_ROW_BYTES + 1).encode()
        else:
            with Path(path).open("rb") as file:  # it may be a pipe, or never end
                content = file.read(MAX_ROW_BYTES + 1)
        if len(content) > MAX_ROW_BYTES:
            raise ConfigError(f"--dialogue {path}: larger than {MAX_ROW_BYTES:,} bytes; split it")
        dialogue = decode_text(content)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--dialogue {path}: {reason}") from error
    if not has_words(dialogue):
        raise ConfigError(f"--dialogue {path}: the dialogue is empty")
    return dialogue


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the model: its task, and what stands for each {NAME} of the request."""

    task: TaskConfig
    fields: dict[str, dict[str, str]]  # by the dialogue's id; {} where the request has no {NAME}

    def as_text(self, key: str) -> str:
        """What tells two requests on one dialogue apart; "" where all are the same."""
        return json.dumps(self.fields[key], sort_keys=True) if key in self.fields else ""


def read_task(args: argparse.Namespace, source: dict) -> tuple[TaskConfig, dict[str, str]]:
    """(the task of the adapter or model, what --field gives). Raises ConfigError.

    source: of `generation_source`.
    """
    named = f"--adapter {args.adapter}" if args.adapter else f"--base {args.base}"
    try:
        task = task_of(source)
    except ConfigError as error:
        raise ConfigError(f"{named}: {error}") from error
    given = {}
    for field in args.field:
        name, separator, value = field.partition("=")
        if not separator or not value.strip() or name not in task.columns:
            known = " and ".join(sorted(task.columns)) or "none"
            raise ConfigError(f"--field {name}: write NAME=VALUE; the request's NAMEs are: {known}")
        given[name] = value.strip()
    missing = sorted(task.columns - given.keys())
    if missing and not args.input:
        raise ConfigError(
            f"--field {missing[0]}=VALUE: the request of {named} has {{{missing[0]}}}, so say what "
            "stands for it"
        )
    return task, given


def read_input(
    args: argparse.Namespace, dialogue: str | None, source: dict
) -> tuple[dict[str, str], Request]:
    """(the dialogues by id, what is asked of each). Raises ConfigError.

    dialogue: the only one; None: those of --input. source: of `generation_source`.
    """
    task, given = read_task(args, source)
    if dialogue is None:
        names = task.columns - given.keys()
        found = read_questions(args.input, parse_columns(args.columns), names)
    else:
        found = {args.dialogue: Question(dialogue, {})}
    fields = {key: given | question.fields for key, question in found.items()}
    dialogues = {key: question.dialogue for key, question in found.items()}
    return dialogues, Request(task, fields if task.columns else {})


def open_output(
    args: argparse.Namespace,
    dialogues: dict[str, str],
    source: dict,
    generation: GenerationSettings,
    request: Request,
) -> NotesFile:
    """The output file, whose lines tell what made them. source: of `generation_source`."""
    made_by: dict[str, Any] = {
        "adapter": None,
        "base": source["base"],
        "revision": source["revision"],
    }
    if args.adapter:
        weights = Path(args.adapter) / "adapter_model.safetensors"
        made_by["adapter"] = digest(weights.read_bytes())
    made_by |= generation.model_dump(mode="json")
    if request.task != SOAP:
        made_by["prompt"] = digest(json.dumps(prompt_texts(request.task)))
    asked = {key: text + request.as_text(key) for key, text in dialogues.items()}
    return NotesFile(args.output, asked, made_by)


def write_batch(
    model,
    tokenizer,
    keys: list[str],
    dialogues: list[str],
    generation: GenerationSettings,
    request: Request,
) -> list[Note]:
    """The notes of some dialogues. keys: the dialogues' ids."""
    task = request.task
    requests = [
        NoteRequest(
            key,
            prompt_ids(tokenizer, text, task, request.fields.get(key)),
            generation.max_new_tokens,
            dialogue=text,
        )
        for key, text in zip(keys, dialogues)
    ]
    return write_best_notes(model, tokenizer, requests, generation, task=task)


def write_file(
    dialogues: dict[str, tuple[str, int]],
    output: NotesFile,
    load,
    generation: GenerationSettings,
    batch_size: int | None,
    request: Request,
) -> None:
    """Writes the notes that the output lacks, in batches of like length, and closes it.

    Args:
        dialogues: of `fit_dialogues`.
        output: the file.
        load: gives (model, tokenizer); it is not called where no note is missing.
        generation: the settings.
        batch_size: dialogues at a time; None: those of GPU_ROWS or ROWS candidates.
        request: what is asked of them.
    """
    missing = [key for key in dialogues if key not in output.done]
    missing.sort(key=lambda key: len(dialogues[key][0]))
    rows = GPU_ROWS if on_gpu() else ROWS
    batch_size = batch_size or max(1, rows // generation.candidates)
    bar = tqdm(total=len(dialogues), initial=len(output.done), unit="note", dynamic_ncols=True)
    with contextlib.closing(output), bar:
        model, tokenizer = load() if missing else (None, None)
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            texts = [dialogues[key][0] for key in keys]
            notes = write_batch(model, tokenizer, keys, texts, generation, request)
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


def fit_to_base(
    source: dict,
    tokenizer,
    dialogues: dict[str, str],
    generation: GenerationSettings,
    request: Request,
) -> dict[str, tuple[str, int]]:
    """The dialogues as the base can read them: of `fit_dialogues`. Says which lost turns.

    source: of `generation_source`. Raises ConfigError where a token has no embedding.
    """
    model_config = load_model_config(source["base"], source["revision"])
    context = context_length(model_config) or sys.maxsize
    fitted = fit_dialogues(
        tokenizer, dialogues, context, generation.max_new_tokens, request.task, request.fields
    )
    warn_of_shortened(fitted, context)
    prompts = {
        key: prompt_ids(tokenizer, text, request.task, request.fields.get(key))
        for key, (text, _) in fitted.items()
    }
    check_vocabulary(source["base"], model_config, prompts)
    return fitted


def generate(args: argparse.Namespace) -> None:
    """Does what the options say. Raises ConfigError."""
    device = "cuda:0" if on_gpu() else "cpu"
    dialogue = None if args.input else read_dialogue(args.dialogue)
    source = generation_source(args.adapter, args.base)
    generation = choose_settings(args, source)
    dialogues, request = read_input(args, dialogue, source)
    if generation.forced_headings and not request.task.headings:
        raise ConfigError("--forced-headings: the task of this model has no headings")
    output = open_output(args, dialogues, source, generation, request) if args.output else None
    tokenizer = load_tokenizer(source["base"], source["revision"])
    if not args.any_prompt:
        option = "--adapter" if args.adapter else "--base"
        check_prompt(option, args.adapter or args.base, tokenizer)
    fitted = fit_to_base(source, tokenizer, dialogues, generation, request)
    load = functools.partial(load_for_generation, args.adapter, args.base, device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if output:
        write_file(fitted, output, load, generation, args.batch_size, request)
        rows = output.done.values()
        endings = count_endings([(row["ended"], row["looped"]) for row in rows])
        parts = [f"{count} of them {what}" for what, count in endings.items()]
        print(", ".join([f"{len(fitted)} notes in {args.output}", *parts]))
    else:
        ((key, (shortened, _)),) = fitted.items()
        model, tokenizer = load()
        (note,) = write_batch(model, tokenizer, [key], [shortened], generation, request)
        for what in count_endings([(note.ended, note.looped)]):
            print(f"the note was {what}", file=sys.stderr)
        print(note.text)


def count_endings(notes: list[tuple[bool | None, bool]]) -> dict[str, int]:
    """How many notes did not come to their own end, by what they were; {} where all did.

    notes: `ended` and `looped` of each.
    """
    counts = {
        "cut off at --max-new-tokens": sum(not ended and not looped for ended, looped in notes),
        "cut off for running in circles": sum(looped for _, looped in notes),
    }
    return {what: count for what, count in counts.items() if count}


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    try:
        args = parse_options(argv)
        generate(args)
    except ConfigError as error:
        exit_with_config_error(error)
    except torch.OutOfMemoryError:
        exit_process(1, f"error: {describe_full_gpu('give a lower --batch-size')}")
    except KeyboardInterrupt:
        if args.output:
            print(
                f"stopped; the notes so far are in {args.output}, and the same command goes on",
                file=sys.stderr,
            )
        sys.exit(130)


if __name__ == "__main__":
    main()
