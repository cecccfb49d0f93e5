"""What steers the choice of a note's next token, and what ends a note that runs in circles.

All of it sees the note alone. A penalty on the words of the dialogue, such as transformers' own,
would keep a note from what it must copy.
"""

import hashlib

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..config.schema import GenerationSettings

LONGEST_PERIOD = 64  # tokens
FEWEST_PERIODS = 4
SHORTEST_LOOP = 48  # tokens; a ruled line or a row of dots is shorter


class GumbelSampler(LogitsProcessor):
    """Turns the greedy choice into a sample from the distribution.

    The largest of log-probabilities with Gumbel noise added is a sample (Gumbel 1954). Each note
    has a generator of its own, so it does not depend on its neighbours, on the batch, or on what
    was written before it.
    """

    def __init__(self, seed: int, keys: list[str]) -> None:
        """keys: one for each note of the batch."""
        self.generators = [self._generator(f"{seed} {key}") for key in keys]

    @staticmethod
    def _generator(text: str) -> torch.Generator:
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [notes, V]."""
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators]
        )  # [notes, V]
        return scores.double() - (-uniform.log()).log().to(scores.device)


class NoRepeatNgram(LogitsProcessor):
    """Bans each token that would complete an n-gram which the note has already.

    For each note it keeps what followed each (n-1)-gram, so a token costs the same at any length.
    It serves one batch, from its first token to its last.
    """

    def __init__(self, n: int, beginnings: list[list[int]]) -> None:
        """n: at least 1. beginnings: tokens of each note that stand in its prompt already."""
        self.n = n
        self.notes = [list(beginning) for beginning in beginnings]
        self.followers: list[dict[tuple[int, ...], list[int]]] = [{} for _ in beginnings]
        self.width: int | None = None  # tokens of the padded prompts
        for row, note in enumerate(self.notes):
            for end in range(n, len(note) + 1):
                self._remember(row, note[end - n : end])

    def _remember(self, row: int, ngram: list[int]) -> None:
        self.followers[row].setdefault(tuple(ngram[:-1]), []).append(ngram[-1])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, [notes, V], with -inf for banned tokens. input_ids: [notes, tokens so far].

        It is called once for each token.
        """
        if self.width is None:
            self.width = input_ids.shape[1]
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                note = self.notes[row]
                note.append(token)
                if len(note) >= self.n:
                    self._remember(row, note[-self.n :])
        rows, tokens = [], []
        for row, note in enumerate(self.notes):
            if len(note) >= self.n - 1:
                last = tuple(note[len(note) - self.n + 1 :])
                banned = self.followers[row].get(last, [])
                rows += [row] * len(banned)
                tokens += banned
        if rows:
            scores = scores.clone()
            scores[rows, tokens] = -torch.inf
        return scores


class LoopDetector:
    """Tells which notes of a batch run in circles.

    A note does when its last `SHORTEST_LOOP` tokens or more are the same `LONGEST_PERIOD` tokens or
    fewer, `FEWEST_PERIODS` times or more. A token costs the same at any length of the note.
    """

    def __init__(self, num_notes: int) -> None:
        self.periods = torch.arange(1, LONGEST_PERIOD + 1)
        needed = (FEWEST_PERIODS * self.periods).clamp(min=SHORTEST_LOOP)
        # The first period has nothing to be equal to.
        self.needed = needed - self.periods
        # For each period, how many of the last tokens equal the one that is a period before.
        self.equal = torch.zeros(num_notes, LONGEST_PERIOD, dtype=torch.int64)

    def update(self, new_ids: torch.Tensor) -> torch.Tensor:
        """Takes the notes' next token; returns which notes run in circles now, bool [notes].

        new_ids: all tokens so far without the prompts, int64 [notes, tokens], on any device. It
        must be called for each token, the first one included.
        """
        recent = new_ids[:, -LONGEST_PERIOD - 1 :].cpu()
        before = recent[:, :-1].flip(1)  # a period of 1 first
        same = before == recent[:, -1:]
        count = same.shape[1]
        self.equal[:, :count] = (self.equal[:, :count] + 1) * same
        return (self.equal >= self.needed).any(1)


def sampling(
    temperature: float, top_p: float, seed: int, keys: list[str], min_p: float = 0.0
) -> LogitsProcessorList:
    """The logits processors with which `generate_notes` samples instead of being greedy.

    top_p: of Holtzman et al., arXiv 1904.09751. min_p: of Nguyen et al., arXiv 2407.01082.
    """
    processors = LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    )
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    processors.append(GumbelSampler(seed, keys))
    return processors


def logits_processors(
    generation: GenerationSettings,
    ids: list[str],
    section: str,
    beginnings: list[list[int]],
) -> LogitsProcessorList:
    """What steers the notes of one batch as the settings say; empty for plain greedy notes.

    Args:
        generation: the settings.
        ids: of the dialogues; with the seed they decide what is drawn.
        section: the heading of the section that is written, "" for a whole note.
        beginnings: tokens of each note that stand in its prompt already.
    """
    processors = LogitsProcessorList()
    if generation.no_repeat_ngram:
        processors.append(NoRepeatNgram(generation.no_repeat_ngram, beginnings))
    if generation.temperature:
        keys = [f"{id} {section}" for id in ids]
        processors += sampling(
            generation.temperature, generation.top_p, generation.seed, keys, generation.min_p
        )
    return processors
