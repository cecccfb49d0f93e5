"""The evaluation of a split: the loss of the model, and the scores of its notes or of a file's."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed

from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError, TaskConfig
from ..data.batch_plan import PackingSpec
from ..data.conversations import Conversation, dialogue_text, note_text, read_split
from ..data.dataset import load_examples
from ..data.parallel import in_chunks, map_chunks
from ..data.soap import SOAP, section_starts
from ..data.tokenization import Example
from ..distributed import timeline
from ..distributed.files import check_writable
from ..distributed.stop import StopRequest
from ..distributed.timeline import timed
from ..distributed.world import Ranks, init_distributed
from ..facts.challenge import challenge
from ..facts.matching import CONTRADICTED, Verdict
from ..families.admission import admit_base, check_vocabulary
from ..generation.decode import Note
from ..generation.notes_file import KeptNotes, digest, read_predictions
from ..generation.sharded import generate_sharded, prompt_of
from ..model.build import build_trained
from .baselines import ROWS_AT_A_TIME, rows_of, score_with_baselines
from .html_report import write_page
from .loss import example_losses
from .scoring import Row, as_table, flagged, interval, ratio, section_of

GOES_ON = "the same command goes on"
MOST_CHALLENGED = 20  # reference notes that every report makes wrong
REFERENCE = "reference"  # in the place of a file to compare with: the reference notes


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated on which split."""

    split: str  # "train", "valid" or "test"
    adapter: str | None = None  # a folder; None: the base alone
    num_notes: int | None = None  # examples that notes are written for; None: all
    predictions: str | None = None  # a file whose notes are scored instead, without a model
    reference: str | None = None  # the column to score against; None: the note's
    html: str | None = None  # where a page with the notes is written
    compare: tuple[str, ...] = ()  # files of other systems' notes for the page; REFERENCE
    # What writes the notes, beside `generation` and the prompts: base, adapter, storage.
    by: dict[str, Any] = dataclasses.field(default_factory=dict)


class EvaluationStopped(Exception):
    """It was asked to stop; what was written is kept. Its text is one line that says so."""


def evaluate_split(config: Config, options: EvaluationOptions) -> dict:
    """The report of a split on rank 0, {} on the others. Every rank must call it.

    Base and adapter are loaded under ZeRO-3 as in training. The report holds

    - figures: the metrics, as `scoring.summarise` returns them, and the loss,
    - examples, left out: of the loss, and rows that are no example,
    - notes: how many were scored; how many were reused from an earlier evaluation by the same
      weights and settings, and how many were written,
    - generation: the settings that they were written with,
    - unsupported: the statements of each note that its dialogue contradicts or lacks, by id,
    - challenge: what the scorer notices in references that were made wrong, as `challenge` says,
    - time: the seconds of each part since the command.

    What needs a model is left out where `predictions` are scored. Raises ConfigError,
    AttentionError where the attention that was asked for can't run here, and EvaluationStopped on
    every rank.
    """
    check_options(config, options)
    reference_config = with_reference(config, options.reference)
    with timed("data"):
        conversations = {c.id: c for c in read_split(reference_config, options.split)[0]}
        train = read_split(reference_config, "train")[0] if options.num_notes != 0 else []
    compared = read_compared(options, conversations)
    if options.predictions:
        report: dict = {"figures": {}}
        ids = list(conversations)[: options.num_notes]
        notes = read_predictions(options.predictions, ids)
        ranks = init_distributed(config.run)
    else:
        report, notes, ranks = evaluate_model(config, options, conversations)
        ids = list(notes)
    if ids:
        timeline.enter("scores")
        chosen = [conversations[id] for id in ids]
        rows, metrics = score_with_baselines(chosen, notes, train, ranks, config.task)
        report["notes"] = len(ids)
        report["figures"] |= metrics
        if ranks.is_main:
            report["unsupported"] = list_unsupported(rows, config.task)
            report["challenge"] = challenge_all(
                [(r.dialogue, r.reference) for r in rows[:MOST_CHALLENGED]]
            )
        if options.html and ranks.is_main:
            title = f"{options.split}, {len(ids)} notes"
            others = {name: rows_of(chosen, theirs) for name, theirs in compared.items()}
            about = describe(config, options)
            table = as_table(report["figures"], config.task)
            write_page(Path(options.html), title, rows, table, about, others)
    report["time"] = timeline.so_far()
    return report if ranks.is_main else {}


def challenge_split(config: Config, options: EvaluationOptions) -> dict[str, list[int]]:
    """What the scorer notices in a split's references that were made wrong, as `challenge` says.

    Raises ConfigError.
    """
    check_options(config, options)
    conversations = read_split(with_reference(config, options.reference), options.split)[0]
    chosen = conversations[: options.num_notes]
    return challenge_all([(dialogue_text(c), note_text(c)) for c in chosen])


def challenge_all(pairs: list[tuple[str, str]]) -> dict[str, list[int]]:
    """As `challenge`, on all cores."""
    total: dict[str, list[int]] = {}
    for counts in map_chunks(_challenge_some, in_chunks(list(enumerate(pairs)), 1)):
        for kind, count in counts.items():
            total[kind] = [a + b for a, b in zip(total.get(kind, [0, 0]), count)]
    return total


def _challenge_some(pairs: list[tuple[int, tuple[str, str]]]) -> dict[str, list[int]]:
    return challenge([pair for _, pair in pairs], first=pairs[0][0])


def evaluate_model(
    config: Config, options: EvaluationOptions, conversations: dict[str, Conversation]
) -> tuple[dict, dict[str, Note], Ranks]:
    """(what the report says of the model, its notes by id, the ranks). Every rank must call it.

    conversations: of the split, by id. Raises as `evaluate_split` does.
    """
    ds_config = build_ds_config(config)
    tokenizer, model_config = admit_base(config)
    with timed("data"):
        examples, dataset_report = load_examples(config, tokenizer, options.split)
    check_vocabulary(config.base, model_config, {e.id: e.input_ids for e in examples})
    # The reference column may lack some.
    sampled = [e for e in examples if e.id in conversations][: options.num_notes]
    ids = [e.id for e in sampled]
    ranks = init_distributed(config.run)
    stop = StopRequest()
    dialogues = {id: dialogue_text(conversations[id]) for id in ids}
    with open_notes(config, options, sampled, dialogues, ranks) as kept:
        engine, packing = load_engine(
            config, ds_config, model_config, options.adapter, examples, ranks
        )
        report: dict = {
            "figures": {"loss": measure_loss(engine, examples, packing, ranks, stop)},
            "examples": len(examples),
            "left out": dataset_report.rows - dataset_report.kept,
        }
        notes = timed("notes")(generate_sharded)(
            engine,
            tokenizer,
            sampled,
            dialogues,
            config.generation,
            ranks,
            stop,
            kept=kept,
            task=config.task,
        )
        if kept:
            report |= finish_notes(kept, notes, ids, stop)
    report["generation"] = config.generation.model_dump(mode="json")
    return report, notes, ranks


def read_compared(
    options: EvaluationOptions, conversations: dict[str, Conversation]
) -> dict[str, dict[str, Note]]:
    """The notes that the page shows beside the evaluated ones: {file: {id: note}}.

    Raises ConfigError. conversations: of the split, by id.
    """
    ids = list(conversations)[: options.num_notes]
    return {
        name: {id: Note(note_text(conversations[id]), None, False) for id in ids}
        if name == REFERENCE
        else read_predictions(name, ids, "--compare")
        for name in options.compare
    }


def describe(config: Config, options: EvaluationOptions) -> dict[str, str]:
    """What wrote the notes and how, as the page shows it."""
    about = {"notes by": options.predictions or options.adapter or f"{config.base}, no adapter"}
    if not options.predictions:
        settings = config.generation.model_dump(mode="json")
        about |= {"base": config.base, "storage": str(config.quantization or "16 or 32 bits")}
        about["generation"] = ", ".join(f"{name}={value}" for name, value in settings.items())
    about["reference"] = f"column {options.reference or config.data.columns.get('note', 'note')}"
    return about


def check_options(config: Config, options: EvaluationOptions) -> None:
    """Raises ConfigError where the options don't fit the configuration."""
    data = config.data
    is_set = getattr(data, options.split) or (options.split == "valid" and data.valid_fraction)
    if not is_set:
        hint = "; --split valid takes the share that was held out" if data.valid_fraction else ""
        raise ConfigError(f"data.{options.split} is not set{hint}")
    if options.reference and "note" not in data.columns:
        raise ConfigError(
            f"--reference {options.reference}: data.columns maps messages, which hold the note "
            "already; map dialogue and note"
        )
    if options.compare and not options.html:
        raise ConfigError("--compare: the page shows them; name it with --html FILE")
    if options.html and os.environ.get("RANK", "0") == "0":
        check_writable("--html", Path(options.html))


def with_reference(config: Config, reference: str | None) -> Config:
    """The configuration that reads the column `reference` as the note; notes need no headings."""
    columns = config.data.columns
    if reference:
        columns = columns | {"note": reference}
    data = config.data.model_copy(update={"columns": columns, "headings": "optional"})
    return config.model_copy(update={"data": data})


def load_engine(
    config: Config,
    ds_config: dict,
    model_config,
    adapter: str | None,
    examples: list[Example],
    ranks: Ranks,
) -> tuple[Any, PackingSpec]:
    """(a ZeRO-3 engine with the base and an adapter, how to pack examples for it).

    Every rank must call it.

    Args:
        config: of the run.
        ds_config: of `build_ds_config`.
        model_config: the base's transformers configuration.
        adapter: a folder, or None for the base with a new adapter, which changes no output.
        examples: which will be evaluated.
        ranks: all of them.
    """
    supervised = sum(e.num_targets for e in examples) / max(1, sum(map(len, examples)))
    model, max_tokens = build_trained(config, ds_config, model_config, adapter, supervised, ranks)
    with timed("engine"):
        engine = deepspeed.initialize(model=model, config=ds_config)[0]
    return engine, PackingSpec(max_tokens, config.max_seq_len)


@timed("evaluation")
def measure_loss(
    engine, examples: list[Example], packing: PackingSpec, ranks: Ranks, stop: StopRequest
) -> dict[str, float | None]:
    """The token-weighted loss in nats, with its interval, as a metric of a report.

    Raises EvaluationStopped.
    """
    losses = example_losses(engine, examples, packing, ranks, stop)
    if losses is None:
        raise EvaluationStopped(f"stopped{_why(stop)} before the first new note; {GOES_ON}")
    low, high = interval(losses)
    return {"value": ratio(losses), "low": low, "high": high}


@contextlib.contextmanager
def open_notes(
    config: Config,
    options: EvaluationOptions,
    examples: list[Example],
    dialogues: dict[str, str],
    ranks: Ranks,
) -> Iterator[KeptNotes | None]:
    """A context with the file of the notes on these examples by these weights and settings.

    None without examples. It lies in runs/NAME/evaluate/SPLIT. Every rank must call it; raises
    ConfigError on all of them.
    dialogues: of the examples, by id.
    """
    if not examples:
        yield None
        return
    prompts = hashlib.sha256()
    for example in examples:  # all of them: what is in a batch with a note may change its rounding
        prompts.update(json.dumps([example.id, prompt_of(example).tolist()]).encode())
    generation = config.generation.model_dump(mode="json")
    by = options.by | {"generation": generation, "prompts": prompts.hexdigest()[:16]}
    if config.generation.forced_headings and config.task.headings != SOAP.headings:
        by["headings"] = [*config.task.headings]
    name = f"notes-{digest(json.dumps(by, sort_keys=True))[:8]}.jsonl"
    folder = config.folder / "evaluate" / options.split
    with contextlib.closing(KeptNotes(folder / name, dialogues, by, ranks)) as kept:
        if kept.found and ranks.is_main:
            print(f"{len(kept.found)} of {len(examples)} notes are in {kept.path.parent} already")
        yield kept


def finish_notes(
    kept: KeptNotes, notes: dict[str, Note], ids: list[str], stop: StopRequest
) -> dict[str, int]:
    """How many notes were reused and written, for the report. Every rank must call it.

    Raises EvaluationStopped where notes are missing.
    """
    missing = [id for id in ids if id not in notes]
    if missing:
        so_far = f"the {len(notes)} of {len(ids)} notes so far are in {kept.path.parent}"
        raise EvaluationStopped(f"stopped{_why(stop)}; {so_far}, and {GOES_ON}")
    kept.finish()
    return {"notes reused": len(kept.found), "notes written": len(ids) - len(kept.found)}


def _why(stop: StopRequest) -> str:
    return f" by {stop.reason}" if stop.reason else ""


def list_unsupported(rows: list[Row], task: TaskConfig = SOAP) -> dict[str, list[str]]:
    """{id: the distinct statements of its note that the dialogue does not support}, where any are.

    Each is written as "verdict, kind: value [section]", with "critical" before what may harm;
    contradictions come first. A claim is written as its place: its words are the note's.
    """
    found: dict[str, list[str]] = {}
    unsupported = functools.partial(_unsupported, task)
    for some in map_chunks(unsupported, in_chunks(rows, ROWS_AT_A_TIME)):
        found |= some
    return found


def _unsupported(task: TaskConfig, rows: list[Row]) -> dict[str, list[str]]:
    found = {}
    for row in rows:
        starts = section_starts(row.note, task)
        # Sorted as they stand here: False, a contradiction, comes first.
        lines = {(v.verdict != CONTRADICTED, _flag_line(v, starts)) for v in flagged(row)}
        if lines:
            found[row.id] = [line for _, line in sorted(lines)]
    return found


def _flag_line(flag: Verdict, starts: list[tuple[int, str]]) -> str:
    """Such as "critical, contradicted, dose: 5 mg [P]". starts: of `section_starts`."""
    statement = flag.statement
    what = flag.title
    if statement.kind == "claim":
        what = f"characters {statement.start} to {statement.end}"
    section = section_of(starts, statement.start)
    line = f"{flag.verdict}, {statement.kind}: {what}"
    if flag.is_critical:
        line = f"critical, {line}"
    return f"{line} [{section}]" if section else line
