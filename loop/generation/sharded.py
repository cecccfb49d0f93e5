"""Writes notes with the model of a ZeRO-3 engine, the batches divided among the ranks."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import psutil
import torch

from ..config.schema import GenerationSettings, TaskConfig
from ..data.soap import SOAP
from ..data.tokenization import Example
from ..distributed.progress import Progress
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..zero3.hooks import without_zero3_hooks
from ..zero3.replicated import is_replicated
from .candidates import write_best_notes
from .decode import ROWS, Note
from .engine import NoteRequest
from .notes_file import KeptNotes

GPU_ROWS = 256  # notes of a batch on a GPU, where the engine writes


def prompt_of(example: Example) -> np.ndarray:
    """The token ids before the answer, the last one where a conversation has several: int [n]."""
    supervised = (example.labels != -100).astype(np.int8)
    starts = np.flatnonzero(np.diff(supervised, prepend=0) == 1)
    return example.input_ids[: int(starts[-1])]


def fits_unsharded(model, ranks: Ranks) -> bool:
    """Whether the full model fits into half of every rank's free memory; the notes get the rest.

    All ranks get the same answer. Every rank must call it.
    """
    full_bytes = sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters()
    )
    if ranks.device.type == "cuda":
        free_bytes: float = torch.cuda.mem_get_info()[0]
    else:
        free_bytes = psutil.virtual_memory().available / ranks.world_size
    return not ranks.any(full_bytes > free_bytes / 2)


class WeightAccess(NamedTuple):
    """How a rank reaches all weights of a ZeRO-3 engine while it writes notes."""

    gathered: bool  # once, for all notes
    partitioned: bool  # they come and go by layers
    lockstep: bool  # the ranks, as each takes part in all gathers of a layer


def choose_access(engine, ranks: Ranks) -> WeightAccess:
    """What the memory allows. Every rank must call it, and gets the same answer."""
    # A GPU may be prefetching for a step to come; what is in flight can't be gathered.
    engine.empty_partition_cache()
    replicated = is_replicated(engine)
    gathered = not replicated and fits_unsharded(engine.module, ranks)
    partitioned = not replicated and not gathered
    return WeightAccess(gathered, partitioned, partitioned and ranks.world_size > 1)


def batch_rows(rows: int | None, ranks: Ranks, access: WeightAccess, candidates: int = 1) -> int:
    """Dialogues of a batch: `rows`, but no more than are good here; None: so many.

    candidates: notes drawn on each, which in lockstep are written one after the other.
    """
    most = GPU_ROWS if ranks.device.type == "cuda" and not access.partitioned else ROWS
    if not access.lockstep:
        most = max(1, most // candidates)
    return min(rows or most, most)


def write_batches(
    model,
    tokenizer,
    batches: list[list[NoteRequest]],
    generation: GenerationSettings,
    access: WeightAccess,
    ranks: Ranks,
    stop,
    task: TaskConfig,
) -> Iterator[dict[str, Note]]:
    """Gives the notes of one batch after the other by their keys, until `stop` is set."""
    for batch in batches:
        # In lockstep all of them stop, before the same batch.
        if stop and (ranks.any(stop.requested) if access.lockstep else stop.requested):
            return
        notes = write_best_notes(
            model,
            tokenizer,
            batch,
            generation,
            partitioned=access.partitioned,
            synced=access.lockstep,
            stop=stop,
            task=task,
        )
        yield {request.key: note for request, note in zip(batch, notes)}


def generate_sharded(
    engine,
    tokenizer,
    examples: list[Example],
    dialogues: dict[str, str],
    generation: GenerationSettings,
    ranks: Ranks,
    stop=None,
    rows: int | None = None,
    kept: KeptNotes | None = None,
    task: TaskConfig = SOAP,
) -> dict[str, Note]:
    """The notes of some examples by id, on every rank. Every rank must call it.

    Some may be missing where the run is asked to stop. Each rank writes its shard of the batches,
    on its own where the full model fits and is gathered once; hooks that would gather again are off
    meanwhile. Where it does not fit, the ranks go in lockstep, a layer at a time.

    Args:
        engine: of DeepSpeed, ZeRO-3.
        tokenizer, generation: the model's; the settings.
        examples: their prompts are read.
        dialogues: texts by id, for candidates to be compared with; {} will do without those.
        ranks: any number of them writes the same notes.
        stop: a StopRequest, which cuts notes off.
        rows: as in `batch_rows`. What is in a batch depends on the examples and `rows` alone, not
            on the number of ranks: another batch would be another rounding. So a batch is written
            whole where `kept` has a part of it.
        kept: has the notes of an earlier run, and takes each batch that was not cut off.
        task: names the headings that are forced.
    """
    found = dict(kept.found) if kept else {}
    if found.keys() >= {e.id for e in examples}:
        return {e.id: found[e.id] for e in examples}
    access = choose_access(engine, ranks)
    rows = batch_rows(rows, ranks, access, generation.candidates)
    batches = batch_by_length(make_requests(examples, dialogues, generation), rows)
    mine, num_own = share_of(batches, found, access, ranks)
    set_activity("writing sample notes")  # of a rank without a batch as well
    written: dict[str, Note] = {}
    gathered = without_zero3_hooks(engine) if access.gathered else contextlib.nullcontext()
    with gathered, Progress("writing notes", len(mine), "batches") as progress:
        writing = write_batches(
            engine.module, tokenizer, mine, generation, access, ranks, stop, task
        )
        for number, notes in enumerate(writing):
            progress.advance()
            if kept:
                if number >= num_own or (stop and stop.requested):  # not its own, or cut off
                    continue
                kept.add(notes)
            written |= notes
    for shard in ranks.all_gather_json(written):
        found |= {id: Note(*note) for id, note in shard.items()}
    return {e.id: found[e.id] for e in examples if e.id in found}


def share_of(
    batches: list[list[NoteRequest]], found: dict[str, Note], access: WeightAccess, ranks: Ranks
) -> tuple[list[list[NoteRequest]], int]:
    """(the batches that this rank writes, how many of them, the first ones, are its own).

    found: notes by key; a batch that is whole there is left out.
    """
    batches = [b for b in batches if not found.keys() >= {request.key for request in b}]
    mine = batches[ranks.rank :: ranks.world_size]
    num_own = len(mine)
    if access.lockstep:
        # A rank that has one batch less writes another's, to take part in its all-gathers.
        mine += batches[:1] * (-(-len(batches) // ranks.world_size) - num_own)
    return mine, num_own


def make_requests(
    examples: list[Example], dialogues: dict[str, str], generation: GenerationSettings
) -> list[NoteRequest]:
    """What is asked for on each example; arguments as in `generate_sharded`."""
    requests = []
    for e in examples:
        dialogue = dialogues[e.id] if generation.candidates > 1 else ""
        prompt = prompt_of(e).tolist()
        requests.append(NoteRequest(e.id, prompt, generation.max_new_tokens, dialogue=dialogue))
    return requests


def batch_by_length(requests: list[NoteRequest], rows: int) -> list[list[NoteRequest]]:
    """Batches of at most `rows` notes with prompts of like length, so that padding is little."""
    ordered = sorted(requests, key=lambda request: (len(request.prompt), request.key))
    return [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
