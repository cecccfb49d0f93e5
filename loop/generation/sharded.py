"""Writes notes with the model of a ZeRO-3 engine, the batches divided among the ranks."""

import contextlib

import numpy as np
import psutil
import torch

from ..config.schema import GenerationSettings
from ..data.tokenization import Example
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..progress import track
from ..zero3.hooks import without_zero3_hooks
from ..zero3.replicated import is_replicated
from .decode import ROWS, Note, write_notes
from .notes_file import KeptNotes


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
    """(whether the model is gathered once, whether the ranks go in lockstep).

    Every rank must call it.
    """
    # A GPU may be prefetching for a step to come; what is in flight can't be gathered.
    engine.empty_partition_cache()
    replicated = is_replicated(engine)
    gather = not replicated and fits_unsharded(engine.module, ranks)
    return gather, not replicated and not gather and ranks.world_size > 1


def generate_sharded(
    engine,
    tokenizer,
    examples: list[Example],
    generation: GenerationSettings,
    ranks: Ranks,
    stop=None,
    rows: int = ROWS,
    kept: KeptNotes | None = None,
) -> dict[str, Note]:
    """The notes of some examples by id, on every rank. Every rank must call it.

    Some may be missing where the run is asked to stop.

    Each rank writes its shard of the batches. Where the full model fits, it is gathered once and
    the ranks write on their own; the engine's hooks are off meanwhile, as they would gather again,
    in lockstep. Where it does not fit, the ranks go in lockstep, a layer at a time.

    Args:
        engine: of DeepSpeed, ZeRO-3.
        tokenizer: the model's.
        examples: their prompts are read.
        generation: the settings.
        ranks: any number of them writes the same notes.
        stop: a StopRequest; the notes are cut off when the run is asked to stop.
        rows: notes of a batch. What is in a batch depends on the examples and `rows` alone, not on
            the number of ranks: another padding would be another rounding. So a batch is written
            whole where `kept` has a part of it.
        kept: has the notes of an earlier run, and takes each batch that was not cut off.
    """
    found = dict(kept.found) if kept else {}
    prompts = {e.id: prompt_of(e).tolist() for e in examples}
    batches = [ids for ids in batch_by_length(prompts, rows) if not found.keys() >= set(ids)]
    if not batches:
        return {e.id: found[e.id] for e in examples}
    mine = batches[ranks.rank :: ranks.world_size]
    num_own = len(mine)
    gather, lockstep = choose_way(engine, ranks)
    if lockstep:
        # A rank that has one batch less writes another's, to take part in its all-gathers.
        mine += batches[:1] * (-(-len(batches) // ranks.world_size) - num_own)
    set_activity("writing sample notes")  # of a rank without a batch as well
    written: dict[str, Note] = {}
    with without_zero3_hooks(engine) if gather else contextlib.nullcontext():
        for number, ids in enumerate(track(mine, "writing notes", "batches")):
            if stop and (ranks.any(stop.requested) if lockstep else stop.requested):
                break  # in lockstep all of them, before the same batch
            batch = {id: prompts[id] for id in ids}
            notes = write_notes(engine.module, tokenizer, batch, generation, lockstep, stop)
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
