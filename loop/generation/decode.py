"""How a model writes notes: batches with a KV cache, greedy or sampled, on one device or shared among ZeRO-3's ranks."""

import hashlib
from collections.abc import Callable
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

ROWS = 16  # notes written at a time


class Note(NamedTuple):
    text: str
    ended: (
        bool | None
    )  # by its end-of-sequence token; else it was cut off at the last token that was allowed; None where nobody knows


class GumbelSampler(LogitsProcessor):
    """Turns the greedy choice into a draw from the distribution: the largest of log-probabilities with Gumbel noise on them is a sample
    (Gumbel 1954). Each note has a generator of its own, so it does not depend on its neighbours, on the batch, or on what was
    written before it."""

    def __init__(self, seed: int, keys: list[str]) -> None:
        self.generators = [
            torch.Generator().manual_seed(
                int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big") >> 1
            )
            for key in keys
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators]
        )  # [notes, V]
        return scores.double() - (-uniform.log()).log().to(scores.device)


def sampling(temperature: float, top_p: float, seed: int, keys: list[str]) -> LogitsProcessorList:
    """What makes `write_notes` sample instead of taking the likeliest token (top_p: Holtzman et al., arXiv 1904.09751)."""
    return LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), GumbelSampler(seed, keys)]
    )


@torch.no_grad()
def generate_notes(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int | list[int],
    synced=False,
    stop=None,
    sampled=None,
    until=None,
) -> list[Note]:
    """Notes for prompts of token ids, as one left-padded batch with a KV cache: greedy, or `sampled` as `sampling` says. max_new_tokens: of
    all, or of each.

    synced: several ZeRO-3 ranks run on until the last one has finished, since each of them must take part in every gather. stop, a
    StopRequest: the notes break off when it is set; a rank that was not asked itself writes its own to the end. until: breaks off a
    note for whose last tokens, as text, it is true; the notes' outer spaces stay then."""
    config, was_training = model.config, model.training
    packed, cache = config._attn_implementation, config.use_cache
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    allowed = (
        torch.tensor(max_new_tokens).expand(len(prompts)).clone()
    )  # tokens of each note, less where it is broken off

    def broken_off(ids, scores, **_) -> torch.Tensor:  # transformers asks after each token
        count = ids.shape[1] - width
        set_activity(f"writing sample notes, token {count}")
        if stop and stop.reason:
            allowed.clamp_(max=count)
        if until:
            met = [
                until(tail)
                for tail in tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - 16) :])
            ]
            allowed[torch.tensor(met)] = allowed[torch.tensor(met)].clamp(max=count)
        return (allowed <= count).to(ids.device)

    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        model.eval()
        inner.set_attn_implementation(
            "sdpa"
        )  # packed attention has no cache; torch's own takes the padding mask
        config.use_cache = True
        out = model.generate(
            input_ids=ids.to(inner.device),
            attention_mask=mask.to(inner.device),
            max_new_tokens=int(allowed.max()),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=synced,
            stopping_criteria=[broken_off],
            logits_processor=sampled,
        )
    finally:
        inner.set_attn_implementation(packed)
        config.use_cache = cache
        model.train(was_training)
    written = [
        row[:most] for row, most in zip(out[:, width:].cpu(), allowed)
    ]  # behind its end a row is padding, which may be EOS
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Note(text if until else text.strip(), tokenizer.eos_token_id in row)
        for text, row in zip(texts, written)
    ]


def generate_with_headings(
    model, tokenizer, dialogues: list[str], max_new_tokens: int, sampled_by: Callable | None = None
) -> list[Note]:
    """Notes with the four headings forced and nothing else: where the model would end or begin another section, the next heading
    is put, and it goes on from there. sampled_by: gives `sampling` for a heading."""
    texts, left, ended = (
        [""] * len(dialogues),
        [max_new_tokens] * len(dialogues),
        [True] * len(dialogues),
    )
    for heading in HEADINGS:
        texts = [f"{text}\n{heading}:".strip() for text in texts]
        # The tokens of a note that begins so, as training has them, without the end-of-sequence token.
        begun = [
            Conversation("", soap_messages(dialogue, text))
            for dialogue, text in zip(dialogues, texts)
        ]
        prompts = [example.input_ids[:-1].tolist() for example in encode_examples(tokenizer, begun)]
        sections = generate_notes(
            model,
            tokenizer,
            prompts,
            left,
            sampled=sampled_by and sampled_by(heading),
            until=lambda tail: before_next_heading(tail) != tail,
        )
        bodies = [before_next_heading(section.text) for section in sections]
        ended = [section.ended or body != section.text for body, section in zip(bodies, sections)]
        texts = [f"{text} {body.strip()}".strip() for text, body in zip(texts, bodies)]
        left = [
            max(1, most - len(tokenizer(body, add_special_tokens=False)["input_ids"]))
            for most, body in zip(left, bodies)
        ]
    return [Note(*note) for note in zip(texts, ended)]
