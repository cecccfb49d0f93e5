"""Writes notes with the model of a ZeRO-3 engine, the batches divided among the ranks."""

import contextlib

import numpy as np
import psutil
import torch

from ..config.schema import GenerationSettings
from ..data.tokenization import Example
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..zero3.hooks import without_zero3_hooks
from ..zero3.replicated import is_replicated
from .decode import ROWS, Note, write_notes
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


def choose_way(engine, ranks: Ranks) -> tuple[bool, bool]:
    """(whether the model is gathered once, whether its weights come and go by layers).

    Every rank must call it.
    """
    # A GPU may be prefetching for a step to come; what is in flight can't be gathered.
    engine.empty_partition_cache()
    replicated = is_replicated(engine)
    gather = not replicated and fits_unsharded(engine.module, ranks)
    return gather, not replicated and not gather


def batch_rows(rows: int | None, ranks: Ranks, partitioned: bool) -> int:
    """Notes of a batch: `rows`, but no more than are good here; None: so many."""
    most = GPU_ROWS if ranks.device.type == "cuda" and not partitioned else ROWS
    return min(rows or most, most)


def generate_sharded(
    engine,
    tokenizer,
    examples: list[Example],
    generation: GenerationSettings,
    ranks: Ranks,
    stop=None,
    rows: int | None = None,
    kept: KeptNotes | None = None,
) -> dict[str, Note]:
    """The notes of some examples by id, on every rank. Every rank must call it.

    Some may be missing where the run is asked to stop. Each rank writes its shard of the batches,
    on its own where the full model fits and is gathered once; hooks that would gather again are off
    meanwhile. Where it does not fit, the ranks go in lockstep, a layer at a time.

    Args:
        engine: of DeepSpeed, ZeRO-3.
        tokenizer, generation: the model's; the settings.
        examples: their prompts are read.
        ranks: any number of them writes the same notes.
        stop: a StopRequest, which cuts notes off.
        rows: as in `batch_rows`. What is in a batch depends on the examples and `rows` alone, not
            on the number of ranks: another batch would be another rounding. So a batch is written
            whole where `kept` has a part of it.
        kept: has the notes of an earlier run, and takes each batch that was not cut off.
    """
    found = dict(kept.found) if kept else {}
    if found.keys() >= {e.id for e in examples}:
        return {e.id: found[e.id] for e in examples}
    gather, partitioned = choose_way(engine, ranks)
    lockstep = partitioned and ranks.world_size > 1
    rows = batch_rows(rows, ranks, partitioned)
    prompts = {e.id: prompt_of(e).tolist() for e in examples}
    requests = {id: NoteRequest(id, ids, generation.max_new_tokens) for id, ids in prompts.items()}
    batches = [ids for ids in batch_by_length(prompts, rows) if not found.keys() >= set(ids)]
    mine = batches[ranks.rank :: ranks.world_size]
    num_own = len(mine)
    if lockstep:
        # A rank that has one batch less writes another's, to take part in its all-gathers.
        mine += batches[:1] * (-(-len(batches) // ranks.world_size) - num_own)
    set_activity("writing sample notes")  # of a rank without a batch as well
    options = {"partitioned": partitioned, "synced": lockstep, "stop": stop}
    written: dict[str, Note] = {}
    with without_zero3_hooks(engine) if gather else contextlib.nullcontext():
        for number, ids in enumerate(mine):
            if stop and (ranks.any(stop.requested) if lockstep else stop.requested):
                break  # in lockstep all of them, before the same batch
            notes = write_notes(
                engine.module, tokenizer, [requests[id] for id in ids], generation, **options
            )
            if kept:
                if number >= num_own or (stop and stop.requested):  # not its own, or cut off
                    continue
                kept.add(dict(zip(ids, notes)))
            written |= dict(zip(ids, notes))
    for shard in ranks.all_gather_json(written):
        found |= {id: Note(*note) for id, note in shard.items()}
    return {e.id: found[e.id] for e in examples if e.id in found}


def batch_by_length(prompts: dict[str, list[int]], rows: int) -> list[list[str]]:
    """Batches of ids, at most `rows` each, of prompts of like length, so that padding is little."""
    ids = sorted(prompts, key=lambda id: (len(prompts[id]), id))
    return [ids[start : start + rows] for start in range(0, len(ids), rows)]
