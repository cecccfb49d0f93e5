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


def note_key(seed: int, key: str) -> int:
    """The 63-bit number that, with a token's place in its note, decides what is drawn."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gumbel_noise(keys: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, the same on every device.

    It is a hash (splitmix64; Steele et al., OOPSLA 2014) of a note's key, the place of the token in
    the note, and the token. So there is no state, and no neighbour changes a note.

    Args:
        keys: int64, of `note_key`.
        places: int64, how many tokens each note has before this one.
        tokens: int64 ids. The noise has the shape to which it and the others broadcast.
    """
    bits = _mix(_mix(keys + places * _GOLDEN) + tokens * _GOLDEN)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def add_gumbel_noise(
    scores: torch.Tensor, keys: torch.Tensor, places: torch.Tensor, few_left: bool
) -> torch.Tensor:
    """Scores with Gumbel noise, float64 [notes, V].

    Args:
        scores: [notes, V].
        keys, places: int64 [notes], as in `gumbel_noise`.
        few_left: most scores are -inf, so noise is made for the others alone; the same noise.
    """
    noisy = scores.to(torch.float64, copy=True)
    if few_left:
        notes, tokens = (scores > -torch.inf).nonzero(as_tuple=True)
        noisy[notes, tokens] += gumbel_noise(keys[notes], places[notes], tokens)
        return noisy
    tokens = torch.arange(scores.shape[1], device=keys.device)
    noise = gumbel_noise(keys[:, None], places[:, None], tokens)
    return noisy + noise.to(scores.device)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed number; products and sums wrap around


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


class GumbelSampler(LogitsProcessor):
    """Turns the greedy choice into a sample from the distribution.

    The largest of log-probabilities with Gumbel noise added is a sample (Gumbel 1954). It serves
    one batch, from its first token to its last.
    """

    def __init__(self, seed: int, keys: list[str]) -> None:
        """keys: one for each note of the batch."""
        self.keys = torch.tensor([note_key(seed, key) for key in keys])
        self.places = torch.zeros_like(self.keys)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [notes, V]."""
        noisy = add_gumbel_noise(scores, self.keys, self.places, few_left=False)
        self.places += 1
        return noisy


class NgramBan:
    """The tokens that would complete an n-gram which a note has already.

    It keeps what followed each (n-1)-gram, so a token costs the same at any length.
    """

    def __init__(self, n: int, beginning: list[int]) -> None:
        """n: at least 1. beginning: tokens of the note that stand in its prompt already."""
        self.n = n
        self.note: list[int] = []
        self.followers: dict[tuple[int, ...], list[int]] = {}
        for token in beginning:
            self.append(token)

    def append(self, token: int) -> None:
        self.note.append(token)
        if len(self.note) >= self.n:
            *before, last = self.note[-self.n :]
            self.followers.setdefault(tuple(before), []).append(last)

    def banned(self) -> list[int]:
        if len(self.note) < self.n - 1:
            return []
        return self.followers.get(tuple(self.note[len(self.note) - self.n + 1 :]), [])


def ban_tokens(scores: torch.Tensor, banned: list[list[int]]) -> torch.Tensor:
    """The scores, [notes, V], with -inf for the tokens that are banned in each note."""
    rows = [row for row, tokens in enumerate(banned) for _ in tokens]
    if rows:
        scores = scores.clone()
        scores[rows, [token for tokens in banned for token in tokens]] = -torch.inf
    return scores


class NoRepeatNgram(LogitsProcessor):
    """Bans each token that would complete an n-gram which the note has already.

    It serves one batch, from its first token to its last.
    """

    def __init__(self, n: int, beginnings: list[list[int]]) -> None:
        """As `NgramBan`, for each note of the batch."""
        self.notes = [NgramBan(n, beginning) for beginning in beginnings]
        self.begun = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, [notes, V], with -inf for banned tokens. input_ids: [notes, tokens so far].

        It is called once for each token.
        """
        if self.begun:
            for note, token in zip(self.notes, input_ids[:, -1].tolist()):
                note.append(token)
        self.begun = True
        return ban_tokens(scores, [note.banned() for note in self.notes])


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

    def forget(self, note: int) -> None:
        """Another note begins in the place of this one."""
        self.equal[note] = 0

    def update(self, new_ids: torch.Tensor) -> torch.Tensor:
        """Takes the notes' next token; returns which notes run in circles now, bool [notes].

        new_ids: all tokens so far without the prompts, int64 [notes, tokens], on any device; of the
        tokens before the last LONGEST_PERIOD + 1 nothing is read. It must be called for each token,
        the first one included.
        """
        recent = new_ids[:, -LONGEST_PERIOD - 1 :].cpu()
        before = recent[:, :-1].flip(1)  # a period of 1 first
        same = before == recent[:, -1:]
        count = same.shape[1]
        self.equal[:, :count] = (self.equal[:, :count] + 1) * same
        return (self.equal >= self.needed).any(1)


def sampling_warpers(temperature: float, top_p: float, min_p: float = 0.0) -> LogitsProcessorList:
    """What makes logits those to draw from; empty for greedy notes.

    A top_p of 1 would sort the vocabulary for each token and leave it as it is.

    top_p: of Holtzman et al., arXiv 1904.09751. min_p: of Nguyen et al., arXiv 2407.01082.
    """
    processors = LogitsProcessorList()
    if temperature:
        processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        if min_p:
            processors.append(MinPLogitsWarper(min_p))
    return processors


def sampling_processors(
    temperature: float, top_p: float, seed: int, keys: list[str], min_p: float = 0.0
) -> LogitsProcessorList:
    """The logits processors with which `generate_notes` samples instead of being greedy."""
    return LogitsProcessorList(
        [*sampling_warpers(temperature, top_p, min_p), GumbelSampler(seed, keys)]
    )


class SlotChoice:
    """Chooses the next token of each slot as the settings say, like `logits_processors`."""

    def __init__(self, generation: GenerationSettings, num_slots: int, device) -> None:
        self.generation = generation
        self.warpers = sampling_warpers(generation.temperature, generation.top_p, generation.min_p)
        self.keys = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.places = torch.zeros_like(self.keys)  # tokens that each note has
        self.bans: list[NgramBan | None] = [None] * num_slots

    @property
    def needs_each_token(self) -> bool:
        """Whether a token must be reported by `append` before the next one can be chosen."""
        return self.generation.no_repeat_ngram > 0

    def begin(self, slots: list[int], keys: list[str], beginnings: list[list[int]]) -> None:
        """Notes begin in these slots; arguments as of `note_key` and `NgramBan`, for each."""
        numbers = [note_key(self.generation.seed, key) for key in keys]
        self.keys[slots] = torch.tensor(numbers, device=self.keys.device)
        self.places[slots] = 0
        for slot, beginning in zip(slots, beginnings):
            if self.generation.no_repeat_ngram:
                self.bans[slot] = NgramBan(self.generation.no_repeat_ngram, beginning)

    def append(self, slot: int, token: int) -> None:
        """A note has got this token."""
        ban = self.bans[slot]
        if ban:
            ban.append(token)

    def choose(self, logits: torch.Tensor, slots: list[int] | slice) -> torch.Tensor:
        """The token of each of these slots, int64 [n], from logits [n, V] in fp32."""
        if self.needs_each_token:
            chosen = self.bans[slots] if isinstance(slots, slice) else [self.bans[i] for i in slots]
            logits = ban_tokens(logits, [ban.banned() if ban else [] for ban in chosen])
        if self.warpers:
            logits = self.warpers(None, logits)
            keys, places = self.keys[slots], self.places[slots]
            few_left = len(self.warpers) > 1  # top_p or min_p
            logits = add_gumbel_noise(logits, keys, places, few_left)
        self.places[slots] += 1
        return logits.argmax(1)


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
        processors += sampling_processors(
            generation.temperature, generation.top_p, generation.seed, keys, generation.min_p
        )
    return processors
