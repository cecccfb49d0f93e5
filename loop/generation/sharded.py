"""How a model writes notes: batches with a KV cache, greedy or sampled, on one device or shared among ZeRO-3's ranks."""

import contextlib

import numpy as np
import psutil
import torch
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

from ..data.tokenization import Example
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from .decode import ROWS, Note, generate_notes


def prompt_of(example: Example):
    """The tokens before the answer: the last supervised ones, where a conversation has several turns."""
    begins = np.diff((example.labels != -100).astype(np.int8), prepend=0) == 1
    return example.input_ids[: int(np.flatnonzero(begins)[-1])]


def fits_unsharded(model, ranks: Ranks) -> bool:
    """Whether every rank has room for the whole model beside what it holds already, with half of the free memory left for the notes. All
    ranks get the same answer."""
    whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    free = (
        torch.cuda.mem_get_info()[0]
        if ranks.device.type == "cuda"
        else psutil.virtual_memory().available / ranks.world_size
    )
    return not ranks.any(whole > free / 2)


def generate_sharded(
    engine,
    tokenizer,
    examples: list[Example],
    max_new_tokens: int,
    ranks: Ranks,
    stop=None,
    rows: int = ROWS,
) -> dict[str, Note]:
    """Greedy notes of examples by id, on every rank; each rank writes its share of the batches. Every rank must call it.

    Where the whole model fits, it is gathered once and the ranks write on their own; the engine's hooks are off meanwhile, for they would
    gather again, in lockstep. Where it does not fit, the ranks do go in lockstep, a layer at a time. What is in a batch depends on the
    examples and `rows` alone, not on the number of ranks: another padding would be another rounding. With `stop`, a StopRequest, the
    notes break off when the run is asked to end."""
    if not examples:
        return {}
    prompts = {e.id: prompt_of(e).tolist() for e in examples}
    keys = sorted(
        prompts, key=lambda key: (len(prompts[key]), key)
    )  # of like length, so that there is little padding
    batches = [keys[start : start + rows] for start in range(0, len(keys), rows)]
    mine = batches[ranks.rank :: ranks.world_size]
    engine.empty_partition_cache()  # a GPU may be prefetching for a step to come; what is in flight can't be gathered
    whole = getattr(engine, "whole", False)
    gathered = whole or fits_unsharded(engine.module, ranks)
    synced = not gathered and ranks.world_size > 1
    if synced:  # a rank that has one batch less writes another's, to take part in its gathers
        mine += batches[:1] * (-(-len(batches) // ranks.world_size) - len(mine))
    set_activity("writing sample notes")  # said by a rank without a share as well
    with (
        unwrap_model_for_generation(engine) if gathered and not whole else contextlib.nullcontext()
    ):
        written: dict[str, Note] = {}
        for keys in mine:
            notes = generate_notes(
                engine.module,
                tokenizer,
                [prompts[key] for key in keys],
                max_new_tokens,
                synced,
                stop,
            )
            written |= dict(zip(keys, notes))
    found = {
        key: Note(*note) for part in ranks.all_gather_json(written) for key, note in part.items()
    }
    return {e.id: found[e.id] for e in examples}
