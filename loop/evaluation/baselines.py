"""How good the model is on a split: token-weighted loss, and its notes scored beside what they have to beat."""

from ..data.conversations import Conversation, dialogue_text, note_text
from ..distributed.watchdog import set_activity
from ..distributed.world import Ranks
from ..generation.decode import Note
from .scoring import Row, most_similar, score_note, summarise


def score_with_baselines(
    conversations: list[Conversation],
    notes: dict[str, Note],
    train: list[Conversation],
    ranks: Ranks,
) -> tuple[list[Row], dict]:
    """(rows by id, the figures of `summarise`), each rank scoring its share; the same on every rank, whatever their number. train: may be empty."""
    set_activity("scoring notes")
    rows = [
        Row(c.id, dialogue_text(c), note_text(c), *notes[c.id])
        for c in sorted(conversations, key=lambda c: c.id)
    ]
    mine = rows[ranks.rank :: ranks.world_size]
    nearest = (
        most_similar([row.dialogue for row in mine], [dialogue_text(c) for c in train])
        if train
        else []
    )
    systems = {
        "notes": [score_note(row) for row in mine],
        **(
            {
                "nearest note": [
                    score_note(row._replace(note=note_text(train[i]), ended=None))
                    for row, i in zip(mine, nearest)
                ]
            }
            if train
            else {}
        ),
        "dialogue": [score_note(row._replace(note=row.dialogue, ended=None)) for row in mine],
        "reference": [score_note(row._replace(note=row.reference, ended=None)) for row in mine],
    }
    parts = ranks.all_gather_json(systems)
    whole = {
        name: [parts[i % ranks.world_size][name][i // ranks.world_size] for i in range(len(rows))]
        for name in systems
    }
    return rows, summarise(whole)
