"""Writes notes in batches with a KV cache: greedy, sampled, or with forced headings."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..data.conversations import Conversation
from ..data.soap import HEADINGS, before_next_heading, soap_messages
from ..data.tokenization import encode_examples
from ..distributed.watchdog import set_activity

ROWS = 16  # notes of a batch
TAIL_TOKENS = 16  # of a note, which `until` sees


class Note(NamedTuple):
    text: str
    # True: by its end-of-sequence token. False: cut off at its last allowed token. None: unknown.
    ended: bool | None


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


def sampling(temperature: float, top_p: float, seed: int, keys: list[str]) -> LogitsProcessorList:
    """The logits processors with which `generate_notes` samples instead of being greedy.

    top_p: of Holtzman et al., arXiv 1904.09751.
    """
    return LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), GumbelSampler(seed, keys)]
    )


class NoteLimits:
    """A stopping criterion: ends each note of a batch at its own number of tokens.

    `max_tokens`, int64 [notes], shrinks where a note is cut off earlier.
    """

    def __init__(
        self,
        tokenizer,
        prompt_width: int,
        max_tokens: torch.Tensor,
        stop=None,
        until: Callable[[str], bool] | None = None,
    ) -> None:
        """Arguments as in `generate_notes`; prompt_width: tokens of the padded prompts."""
        self.tokenizer = tokenizer
        self.prompt_width = prompt_width
        self.max_tokens = max_tokens
        self.stop = stop
        self.until = until

    def __call__(self, ids: torch.Tensor, scores, **_) -> torch.Tensor:
        """Which notes are finished, bool [notes]; transformers asks after each token.

        ids: [notes, prompt_width + new tokens].
        """
        count = ids.shape[1] - self.prompt_width
        set_activity(f"writing sample notes, token {count}")
        if self.stop and self.stop.requested:
            self.max_tokens.clamp_(max=count)
        if self.until:
            start = max(self.prompt_width, ids.shape[1] - TAIL_TOKENS)
            tails = self.tokenizer.batch_decode(ids[:, start:])
            met = torch.tensor([self.until(tail) for tail in tails])
            self.max_tokens[met] = self.max_tokens[met].clamp(max=count)
        return (self.max_tokens <= count).to(ids.device)


@torch.no_grad()
def generate_notes(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int | list[int],
    synced: bool = False,
    stop=None,
    logits_processor: LogitsProcessorList | None = None,
    until: Callable[[str], bool] | None = None,
) -> list[Note]:
    """The notes of some prompts, written as one left-padded batch with a KV cache.

    Args:
        model: its mode, its attention and its `use_cache` are the same afterwards.
        tokenizer: the model's.
        prompts: token ids.
        max_new_tokens: of every note, or of each.
        synced: the ranks of ZeRO-3 run on until the last one has finished, as each of them must
            take part in every all-gather.
        stop: a StopRequest; the notes are cut off when it is set. A rank that was not asked itself
            writes its own to the end.
        logits_processor: makes the choice another than the greedy one, as `sampling` does.
        until: a note is cut off when this is true for the text of its last tokens. The white space
            around the notes stays then.
    """
    pad_token = tokenizer.pad_token_id
    if pad_token is None:
        pad_token = tokenizer.eos_token_id
    ids, mask = pad_left(prompts, pad_token)
    width = ids.shape[1]
    limits = NoteLimits(
        tokenizer, width, torch.tensor(max_new_tokens).expand(len(prompts)).clone(), stop, until
    )
    with generation_mode(model) as device:
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=int(limits.max_tokens.max()),
            # Greedy, whatever the base's generation_config.json asks for.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_token,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=synced,
            stopping_criteria=[limits],
            logits_processor=logits_processor,
        )
    # After its end a row is padding, which may be the end-of-sequence token.
    rows = [row[:count] for row, count in zip(out[:, width:].cpu(), limits.max_tokens)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    if not until:
        texts = [text.strip() for text in texts]
    return [Note(text, tokenizer.eos_token_id in row) for text, row in zip(texts, rows)]


def pad_left(prompts: list[list[int]], pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, attention mask) of prompts of unequal length, int64 [prompts, longest]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextlib.contextmanager
def generation_mode(model) -> Iterator[torch.device]:
    """Puts a model into evaluation mode, with a KV cache, and restores it. Gives its device.

    Packed attention has no cache, so PyTorch's own attention stands in; it takes the padding mask.
    """
    config = model.config
    was_training = model.training
    attention = config._attn_implementation
    use_cache = config.use_cache
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        model.eval()
        base.set_attn_implementation("sdpa")
        config.use_cache = True
        yield base.device
    finally:
        base.set_attn_implementation(attention)
        config.use_cache = use_cache
        model.train(was_training)


def generate_with_headings(
    model,
    tokenizer,
    dialogues: list[str],
    max_new_tokens: int,
    make_logits_processor: Callable[[str], LogitsProcessorList | None] = lambda heading: None,
) -> list[Note]:
    """Notes with the four headings forced and nothing else.

    Where the model would end the note or begin another section, the next heading is inserted, and
    the model continues from there.

    Args:
        model: as in `generate_notes`.
        tokenizer: the model's.
        dialogues: one for each note.
        max_new_tokens: of each note, not counting the headings.
        make_logits_processor: gives the `logits_processor` for a heading's section.
    """
    texts = [""] * len(dialogues)
    tokens_left = [max_new_tokens] * len(dialogues)
    ended: list[bool | None] = [True] * len(dialogues)
    for heading in HEADINGS:
        texts = [f"{text}\n{heading}:".strip() for text in texts]
        sections = generate_notes(
            model,
            tokenizer,
            _prompts_with_beginnings(tokenizer, dialogues, texts),
            tokens_left,
            logits_processor=make_logits_processor(heading),
            until=_begins_next_section,
        )
        bodies = [before_next_heading(section.text) for section in sections]
        ended = [section.ended or body != section.text for body, section in zip(bodies, sections)]
        texts = [f"{text} {body.strip()}".strip() for text, body in zip(texts, bodies)]
        tokens_left = [
            max(1, left - len(tokenizer(body, add_special_tokens=False)["input_ids"]))
            for left, body in zip(tokens_left, bodies)
        ]
    return [Note(text, note_ended) for text, note_ended in zip(texts, ended)]


def _prompts_with_beginnings(
    tokenizer, dialogues: list[str], beginnings: list[str]
) -> list[list[int]]:
    """The prompts with the notes' beginnings, tokenised as in training, without the final EOS."""
    conversations = [
        Conversation("", soap_messages(dialogue, beginning))
        for dialogue, beginning in zip(dialogues, beginnings)
    ]
    return [e.input_ids[:-1].tolist() for e in encode_examples(tokenizer, conversations)]


def _begins_next_section(tail: str) -> bool:
    return before_next_heading(tail) != tail
