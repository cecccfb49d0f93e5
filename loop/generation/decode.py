"""Writes notes in batches with a KV cache: greedy, sampled, or with forced headings."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..config.schema import GenerationSettings
from ..data.conversations import Conversation
from ..data.soap import HEADINGS, before_next_heading
from ..data.tokenization import IGNORE, encode_examples
from ..distributed.watchdog import set_activity
from .controls import LoopDetector, logits_processors

ROWS = 16  # notes of a batch
TAIL_TOKENS = 16  # of a note, which `until` sees


class Note(NamedTuple):
    text: str
    # True: by its end-of-sequence token. False: cut off, at its last allowed token or because it
    # ran in circles. None: unknown.
    ended: bool | None
    looped: bool = False  # ran in circles; with forced headings, in one section or more


class NoteLimits:
    """A stopping criterion: ends each note of a batch at its own number of tokens.

    `max_tokens`, int64 [notes], shrinks where a note is cut off earlier. `looped`, bool [notes],
    are those that were cut off because they ran in circles.
    """

    def __init__(
        self,
        tokenizer,
        prompt_width: int,
        max_tokens: torch.Tensor,
        stop=None,
        until: Callable[[str], bool] | None = None,
        end_loops: bool = False,
    ) -> None:
        """Arguments as in `generate_notes`; prompt_width: tokens of the padded prompts."""
        self.tokenizer = tokenizer
        self.prompt_width = prompt_width
        self.max_tokens = max_tokens
        self.stop = stop
        self.until = until
        self.loops = LoopDetector(len(max_tokens)) if end_loops else None
        self.looped = torch.zeros(len(max_tokens), dtype=torch.bool)
        self.ended = torch.zeros_like(self.looped)  # by their EOS; padding follows

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
        if self.loops:
            self.ended |= ids[:, -1].cpu() == self.tokenizer.eos_token_id
            looping = self.loops.update(ids[:, self.prompt_width :])
            looping &= ~self.ended & (self.max_tokens >= count)
            self.looped |= looping
            self.max_tokens[looping] = count
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
    end_loops: bool = False,
) -> list[Note]:
    """The notes of some prompts, written as one left-padded batch with a KV cache.

    Nothing that the base's generation_config.json asks for counts.

    Args:
        model: its mode, its attention and its `use_cache` are the same afterwards.
        tokenizer: the model's.
        prompts: token ids.
        max_new_tokens: of every note, or of each.
        synced: the ranks of ZeRO-3 run on until the last one has finished, as each of them must
            take part in every all-gather.
        stop: a StopRequest; the notes are cut off when it is set. A rank that was not asked itself
            writes its own to the end.
        logits_processor: makes the choice another than the greedy one, as `logits_processors` do.
        until: a note is cut off when this is true for the text of its last tokens. The white space
            around the notes stays then.
        end_loops: cut off and mark a note that runs in circles.
    """
    pad_token = tokenizer.pad_token_id
    if pad_token is None:
        pad_token = tokenizer.eos_token_id
    ids, mask = pad_left(prompts, pad_token)
    width = ids.shape[1]
    max_tokens = torch.tensor(max_new_tokens).expand(len(prompts)).clone()
    limits = NoteLimits(tokenizer, width, max_tokens, stop, until, end_loops)
    greedy = GenerationConfig(
        max_new_tokens=int(max_tokens.max()),
        do_sample=False,
        pad_token_id=pad_token,
        eos_token_id=tokenizer.eos_token_id,
    )
    with generation_mode(model) as device:
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=greedy,
            synced_gpus=synced,
            stopping_criteria=[limits],
            logits_processor=logits_processor,
        )
    # After its end a row is padding, which may be the end-of-sequence token.
    rows = [row[:count] for row, count in zip(out[:, width:].cpu(), limits.max_tokens)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    if not until:
        texts = [text.strip() for text in texts]
    return [
        Note(text, tokenizer.eos_token_id in row, bool(looped))
        for text, row, looped in zip(texts, rows, limits.looped)
    ]


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
    The base's generation_config is put aside: transformers would fill in from it whatever a call
    leaves open.
    """
    config = model.config
    was_training = model.training
    attention = config._attn_implementation
    text_config = config.get_text_config()  # of the language model
    use_cache = text_config.use_cache
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    generation_config = base.generation_config
    try:
        base.generation_config = GenerationConfig()
        model.eval()
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        text_config.use_cache = True
        yield base.device
    finally:
        base.generation_config = generation_config
        base.set_attn_implementation(attention)
        text_config.use_cache = use_cache
        model.train(was_training)


def write_notes(
    model,
    tokenizer,
    prompts: dict[str, list[int]],
    generation: GenerationSettings,
    synced: bool = False,
    stop=None,
) -> list[Note]:
    """The notes of one batch as the settings say: the one way from a run's settings to its notes.

    A note depends on the model, its prompt, its id and the settings.

    Args:
        model: as in `generate_notes`.
        tokenizer: the model's.
        prompts: token ids, by the dialogue's id.
        generation: the settings.
        synced: as in `generate_notes`.
        stop: as in `generate_notes`.
    """
    ids = list(prompts)
    if generation.forced_headings:
        return generate_with_headings(
            model,
            tokenizer,
            list(prompts.values()),
            generation.max_new_tokens,
            lambda heading, begun: logits_processors(generation, ids, heading, begun),
            synced,
            stop,
            generation.end_loops,
        )
    return generate_notes(
        model,
        tokenizer,
        list(prompts.values()),
        generation.max_new_tokens,
        synced,
        stop,
        logits_processors(generation, ids, "", [[] for _ in ids]),
        end_loops=generation.end_loops,
    )


def generate_with_headings(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    make_logits_processor: Callable[[str, list[list[int]]], LogitsProcessorList | None],
    synced: bool = False,
    stop=None,
    end_loops: bool = False,
) -> list[Note]:
    """Notes with the four headings forced and nothing else.

    Where the model would end the note or begin another section, the next heading is inserted, and
    the model continues from there. So it does where a section runs in circles.

    Args:
        model: as in `generate_notes`.
        tokenizer: the model's.
        prompts: token ids, one list for each note.
        max_new_tokens: of each note, not counting the headings.
        make_logits_processor: gives the `logits_processor` for a heading's section, of the heading
            and the tokens of each note so far.
        synced: as in `generate_notes`.
        stop: as in `generate_notes`.
        end_loops: as in `generate_notes`.
    """
    texts = [""] * len(prompts)
    tokens_left = [max_new_tokens] * len(prompts)
    ended: list[bool | None] = [True] * len(prompts)
    looped = [False] * len(prompts)
    for heading in HEADINGS:
        texts = [f"{text}\n{heading}:".strip() for text in texts]
        begun = _encode_beginnings(tokenizer, texts)
        sections = generate_notes(
            model,
            tokenizer,
            [prompt + ids for prompt, ids in zip(prompts, begun)],
            tokens_left,
            synced,
            stop,
            make_logits_processor(heading, begun),
            _begins_next_section,
            end_loops,
        )
        bodies = [before_next_heading(section.text) for section in sections]
        ended = [section.ended or body != section.text for body, section in zip(bodies, sections)]
        looped = [before or section.looped for before, section in zip(looped, sections)]
        texts = [f"{text} {body.strip()}".strip() for text, body in zip(texts, bodies)]
        tokens_left = [
            max(1, left - len(tokenizer(body, add_special_tokens=False)["input_ids"]))
            for left, body in zip(tokens_left, bodies)
        ]
    return [Note(*note) for note in zip(texts, ended, looped)]


def _encode_beginnings(tokenizer, beginnings: list[str]) -> list[list[int]]:
    """The token ids of notes' beginnings, tokenised as answers in training, without an EOS.

    What stands before the answer's place in the template does not change them.
    """
    conversations = [
        Conversation("", [{"role": "user", "content": "-"}, {"role": "assistant", "content": text}])
        for text in beginnings
    ]
    return [
        example.input_ids[example.labels != IGNORE][:-1].tolist()
        for example in encode_examples(tokenizer, conversations)
    ]


def _begins_next_section(tail: str) -> bool:
    return before_next_heading(tail) != tail
