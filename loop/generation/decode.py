"""Writes notes: greedy, sampled, or with forced headings; by the engine, or the plain way.

The plain way is transformers' generate, in batches.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ..config.schema import GenerationSettings, TaskConfig
from ..data.conversations import Conversation
from ..data.soap import SOAP, before_next_heading
from ..data.tokenization import IGNORE, encode_examples
from ..distributed.watchdog import set_activity
from ..model.structure import context_length
from .controls import LoopDetector, logits_processors
from .engine import NoteRequest, Session, SlotNote, say_once
from .engine_choice import Engine, EngineError, open_engine
from .model_mode import generation_mode

ROWS = 16  # notes of a batch, the plain way
TAIL_TOKENS = 16  # of a note, which `until` sees


class Note(NamedTuple):
    text: str
    # True: by its end-of-sequence token. False: cut off, at its last allowed token or because it
    # ran in circles. None: unknown.
    ended: bool | None
    looped: bool = False  # ran in circles; with forced headings, in one section or more


# Takes requests, the heading of the section that is written or "", what cuts a note off (as in
# `generate_notes`), and a function for each note that has ended. Returns all notes.
WriteNotes = Callable[
    [
        list[NoteRequest],
        str,
        Callable[[str], bool] | None,
        Callable[[int, Note], None] | None,
    ],
    list[Note],
]


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


def write_notes(
    model,
    tokenizer,
    requests: list[NoteRequest],
    generation: GenerationSettings,
    *,
    partitioned: bool = False,
    synced: bool = False,
    stop=None,
    done: Callable[[int, Note], None] | None = None,
    rows: int | None = None,
    task: TaskConfig = SOAP,
) -> list[Note]:
    """The notes of some requests as the settings say: the one way from settings to notes.

    A note depends on the model, its prompt, its key and the settings. The engine writes it where it
    can, else transformers' generate, and a line on stderr says why. A note ends where the base's
    context does.

    Args:
        model: as in `generate_notes`.
        tokenizer: the model's.
        requests: any number of them.
        generation: the settings; a request has its own limit.
        partitioned: the weights come and go by layers, which the engine can't follow.
        synced: as in `generate_notes`; at most ROWS requests then, and on every rank.
        stop: as in `generate_notes`.
        done: takes a request's number and its note as soon as the note has ended; it is not called
            for notes that `stop` cut off.
        rows: notes at a time; None: as many as are good here.
        task: names the headings that are forced.
    """
    forced = task if generation.forced_headings else None
    queue = NoteQueue(tokenizer, requests, forced, stop, done)
    reason = "the weights are partitioned" if partitioned else ""
    if requests and not partitioned:
        try:
            with open_engine(model, requests[0].prompt) as engine:
                return queue.complete(engine_writer(engine, tokenizer, generation, stop, rows))
        except EngineError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "memory is short"
    if reason:
        say_once(f"notes       written by transformers' generate, which takes longer: {reason}")
    return queue.complete(plain_writer(model, tokenizer, generation, synced, stop, rows or ROWS))


class NoteQueue:
    """Requests and the notes on them so far. One writer can go on where another one failed."""

    def __init__(self, tokenizer, requests, forced: TaskConfig | None, stop, done) -> None:
        """forced: the task whose headings are forced, if any. The rest as in `write_notes`."""
        self.tokenizer = tokenizer
        self.requests = requests
        self.forced = forced
        self.stop = stop
        self.done = done
        self.notes: dict[int, Note] = {}  # by the number of their request

    def finish(self, number: int, note: Note) -> None:
        self.notes[number] = note
        if self.done:
            self.done(number, note)

    def complete(self, write: WriteNotes) -> list[Note]:
        """Writes what is missing; returns all notes."""
        missing = [number for number in range(len(self.requests)) if number not in self.notes]
        requests = [self.requests[number] for number in missing]
        if self.forced:
            notes = write_with_headings(self.tokenizer, requests, write, self.forced)
            if not (self.stop and self.stop.requested):
                for number, note in zip(missing, notes):
                    self.finish(number, note)
        else:
            notes = write(requests, "", None, lambda i, note: self.finish(missing[i], note))
        found = dict(zip(missing, notes)) | self.notes
        return [found[number] for number in range(len(self.requests))]


def engine_writer(
    engine: Engine, tokenizer, generation: GenerationSettings, stop, rows: int | None
) -> WriteNotes:
    """Writes by the engine; arguments as in `write_notes`."""

    def write(requests, section, until, done) -> list[Note]:
        notes = [Note("", False)] * len(requests)  # of those that `stop` keeps from beginning

        def end(number: int, written: SlotNote) -> None:
            text = tokenizer.decode(written.tokens, skip_special_tokens=True)
            has_eos = written.tokens[-1] == tokenizer.eos_token_id
            text = text if until else text.strip()
            notes[number] = Note(text, has_eos, written.looped)
            if done and (has_eos or not written.stopped):
                done(number, notes[number])

        def meets_until(tokens: list[int]) -> bool:
            return until(tokenizer.decode(tokens[-TAIL_TOKENS:]))

        requests = within_context(engine.base, requests)
        keyed = [dataclasses.replace(r, key=f"{r.key} {section}") for r in requests]
        slots = engine.slots_for(keyed, rows)
        eos_token = tokenizer.eos_token_id
        cuts = meets_until if until else None
        Session(slots, keyed, generation, eos_token, end, stop, cuts).run()
        return notes

    return write


def plain_writer(
    model, tokenizer, generation: GenerationSettings, synced: bool, stop, rows: int
) -> WriteNotes:
    """Writes by transformers' generate; arguments as in `write_notes`."""

    def write(requests, section, until, done) -> list[Note]:
        requests = within_context(model, requests)
        notes: list[Note] = []
        for start in range(0, len(requests), rows):
            batch = requests[start : start + rows]
            begun = [r.begun for r in batch]
            notes += generate_notes(
                model,
                tokenizer,
                [r.prompt for r in batch],
                [r.max_new_tokens for r in batch],
                synced,
                stop,
                logits_processors(generation, [r.key for r in batch], section, begun),
                until,
                generation.end_loops,
            )
            for number in range(start, len(notes)):
                if done and not (stop and stop.requested):
                    done(number, notes[number])
        return notes

    return write


def within_context(model, requests: list[NoteRequest]) -> list[NoteRequest]:
    """The requests, whose notes end where the base's context does."""
    context = context_length(model.config.get_text_config())
    if not context:
        return requests
    capped = [
        dataclasses.replace(
            r, max_new_tokens=max(1, min(r.max_new_tokens, context - len(r.prompt)))
        )
        for r in requests
    ]
    if capped != requests:
        say_once(
            f"notes       end where the base's context of {context:,} tokens does; the longest "
            "prompts leave less than generation.max_new_tokens"
        )
    return capped


def write_with_headings(
    tokenizer, requests: list[NoteRequest], write: WriteNotes, task: TaskConfig = SOAP
) -> list[Note]:
    """As `generate_with_headings`, by any writer."""

    def write_section(heading: str, begun: list[list[int]], tokens_left: list[int]) -> list[Note]:
        sections = [
            NoteRequest(r.key, r.prompt + ids, left, ids)
            for r, ids, left in zip(requests, begun, tokens_left)
        ]
        return write(sections, heading, lambda tail: _begins_next_section(tail, task), None)

    return _by_sections(tokenizer, [r.max_new_tokens for r in requests], write_section, task)


def generate_with_headings(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    make_logits_processor: Callable[[str, list[list[int]]], LogitsProcessorList | None],
    synced: bool = False,
    stop=None,
    end_loops: bool = False,
    task: TaskConfig = SOAP,
) -> list[Note]:
    """Notes with the task's headings forced and nothing else.

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
        task: names the headings.
    """

    def write_section(heading: str, begun: list[list[int]], tokens_left: list[int]) -> list[Note]:
        return generate_notes(
            model,
            tokenizer,
            [prompt + ids for prompt, ids in zip(prompts, begun)],
            tokens_left,
            synced,
            stop,
            make_logits_processor(heading, begun),
            lambda tail: _begins_next_section(tail, task),
            end_loops,
        )

    return _by_sections(tokenizer, [max_new_tokens] * len(prompts), write_section, task)


def _by_sections(
    tokenizer,
    tokens_left: list[int],
    write_section: Callable[[str, list[list[int]], list[int]], list[Note]],
    task: TaskConfig,
) -> list[Note]:
    """Notes that are written section by section.

    Args:
        tokenizer: the model's.
        tokens_left: of each note, not counting the headings.
        write_section: takes a heading, the tokens of each note up to it, and how many tokens each
            may have; returns each note's section.
        task: names the headings.
    """
    texts = [""] * len(tokens_left)
    ended: list[bool | None] = [True] * len(texts)
    looped = [False] * len(texts)
    for heading in task.headings:
        texts = [f"{text}\n{heading}:".strip() for text in texts]
        begun = _encode_beginnings(tokenizer, texts)
        sections = write_section(heading, begun, tokens_left)
        bodies = [before_next_heading(section.text, task) for section in sections]
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


def _begins_next_section(tail: str, task: TaskConfig) -> bool:
    """Whether the end of a section begins another one."""
    return before_next_heading(tail, task) != tail
