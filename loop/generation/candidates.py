"""Several notes drawn on one dialogue, of which the one that agrees best with it is given.

The reference note is never read: what chooses is what is known where a note is needed.
"""

import dataclasses
import functools

from ..config.schema import Config, GenerationSettings
from ..data.conversations import dialogue_text, read_split
from ..data.parallel import in_chunks, map_chunks
from ..facts.judges.verdicts import SUPPORTED, Verdict, distinct
from ..facts.matching import compare
from .decode import Note, write_notes
from .engine import NoteRequest

NOTES_AT_A_TIME = 8  # that one process compares with their dialogues, before it takes others


def write_best_notes(
    model,
    tokenizer,
    requests: list[NoteRequest],
    generation: GenerationSettings,
    *,
    synced: bool = False,
    **options,
) -> list[Note]:
    """The notes of some requests: of each `generation.candidates` are drawn, and one is chosen.

    Candidate k of a request with the key "a" is the note of the key "a#k". A candidate that is the
    only one keeps the key.

    Args:
        model, tokenizer: as in `write_notes`.
        requests: their `dialogue` is compared with the candidates.
        generation: the settings.
        synced: as in `write_notes`.
        options: `partitioned`, `stop`, `rows` and `task` of `write_notes`.
    """
    write = functools.partial(write_notes, model, tokenizer, generation=generation, synced=synced)
    count = generation.candidates
    if count == 1:
        return write(requests=requests, **options)
    draws = [
        [dataclasses.replace(request, key=f"{request.key}#{k}") for request in requests]
        for k in range(count)
    ]
    if synced:  # each rank writes as many batches as the others
        drawn = [write(requests=draw, **options) for draw in draws]
    else:
        together = [request for draw in draws for request in draw]
        notes = write(requests=together, **options)
        drawn = [notes[k * len(requests) : (k + 1) * len(requests)] for k in range(count)]
    pairs = [(r.dialogue, note.text) for r, notes in zip(requests, zip(*drawn)) for note in notes]
    chunks = in_chunks(pairs, NOTES_AT_A_TIME)
    agreements = [a for some in map_chunks(agree_each, chunks, on_all_ranks=True) for a in some]
    return [choose(*candidates) for candidates in zip(zip(*drawn), in_chunks(agreements, count))]


def choose(candidates: tuple[Note, ...], agreements: list[float]) -> Note:
    """The note whose facts agree best with the dialogue; of equals the first.

    A note that ran in circles or was cut off comes behind all that ended.

    Args:
        candidates: notes on one dialogue.
        agreements: what `agreement` gives for each.
    """

    def merit(number: int) -> tuple[bool, float]:
        note = candidates[number]
        return bool(note.ended) and not note.looped, agreements[number]

    return candidates[max(range(len(candidates)), key=merit)]


def agree_each(pairs: list[tuple[str, str]]) -> list[float]:
    """`agreement` of each pair of a dialogue and a note."""
    return [agreement(*pair) for pair in pairs]


def agreement(dialogue: str, note: str) -> float:
    """How well a note agrees with its dialogue, 0 to 1; 0 where either text states no facts.

    A weighted harmonic mean of two shares of distinct facts, claims left out as in the scores: the
    note's facts that the dialogue supports, which weigh twice, as what is wrong does more harm than
    what is missing, and the dialogue's facts that the note keeps.
    """
    found = compare(dialogue, note)
    stated = [v for v in distinct(found.note) if v.statement.kind != "claim"]
    right = share_supported(stated)
    kept = share_supported(distinct(found.dialogue))
    return 3 * right * kept / (right + 2 * kept) if right and kept else 0.0


def share_supported(facts: list[Verdict]) -> float:
    """The fraction of the facts that the other text supports; 0 without facts."""
    return sum(v.verdict == SUPPORTED for v in facts) / max(len(facts), 1)


def read_dialogues(config: Config, split: str) -> dict[str, str]:
    """A split's dialogues by id, for candidates to be compared with; {} where there are none.

    Raises ConfigError.
    """
    if config.generation.candidates == 1:
        return {}
    return {c.id: dialogue_text(c) for c in read_split(config, split)[0]}
