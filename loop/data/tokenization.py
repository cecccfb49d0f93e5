"""From conversations to token ids, and to labels that supervise the note, its end-of-sequence token included, and nothing else."""

import dataclasses
import re

import jinja2
import numpy as np

from ..config.schema import ConfigError
from .conversations import Conversation

IGNORE = -100  # the label of a token that is not supervised, as everywhere in the field
# For a base that brings no chat template of its own.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation. A label is the token itself where it is supervised, otherwise -100."""

    id: str
    input_ids: np.ndarray  # int32 [L]
    labels: np.ndarray  # int32 [L]
    weight: float = 1.0  # how often an epoch visits it

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Supervised tokens. The first token of a document has no predecessor that could predict it."""
        return int((self.labels[1:] != IGNORE).sum())


def render(tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """The conversation as the base's chat template writes it."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:  # e.g. a template that knows no system role
        roles = ", ".join(m["role"] for m in messages)
        raise ConfigError(
            f"the base's chat template refuses a conversation of {roles}: {type(error).__name__}"
        ) from error


def special_tokens(tokenizer) -> dict[str, int]:
    """The spelling and id of every token that the tokenizer finds before anything else: more than `all_special_tokens`, which lacks a
    template's role tags in some bases."""
    return {
        str(token): number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def encode(tokenizer, conversations: list[tuple[list[dict[str, str]], bool]]) -> list[list[int]]:
    """Token ids of conversations, each (messages, add_generation_prompt), under the tokenizer's chat template. Training and
    generation both come through here.

    Text that spells a special token ("</s>") inside a message stays text: such a conversation is put together from the
    template's frame, where special tokens count, and the contents, where they don't."""
    specials = special_tokens(tokenizer)
    texts = [render(tokenizer, *c) for c in conversations]
    if getattr(
        tokenizer, "is_fast", False
    ):  # without the offsets that nobody asks for, in as many threads as there are cores
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = False
        backend.no_truncation(), backend.no_padding()  # tokenizer.json may have them on
        encoded = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for at, (messages, prompt) in enumerate(conversations):
        if not any(s in m["content"] for s in specials for m in messages):
            continue
        marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        encoded[at] = []
        for i, piece in enumerate(
            re.split("\ue000(\\d+)\ue001", render(tokenizer, marked, prompt))
        ):
            inside = i % 2 == 1
            piece = messages[int(piece)]["content"] if inside else piece
            encoded[at] += (
                tokenizer(piece, add_special_tokens=False, split_special_tokens=inside)["input_ids"]
                if piece
                else []
            )
    return encoded


def encode_prompts(
    tokenizer, conversations: list[list[dict[str, str]]], wholes: list[list[int]]
) -> list[list[int]]:
    """`encode` of the prompts of conversations, all but their last message, without doing the work twice: `wholes` are their tokens.

    A special token is a hard boundary: what stands before it is tokenised the same whatever follows. So a prompt is the whole up to
    its last special token, and then the few tokens of the template's own text (often none) that lead to the answer."""
    specials = special_tokens(tokenizer)
    tails: dict[
        tuple, tuple[list[int], list[int]]
    ] = {}  # roles, text behind the last special token -> (the prompt's special tokens, tail)
    found: list[list[int] | None] = []
    for messages, whole in zip(conversations, wholes):
        text = render(tokenizer, messages[:-1], True)
        last, token = max(
            ((text.rfind(s) + len(s), s) for s in specials if s in text), default=(0, "")
        )
        if not last or any(s in m["content"] for s in specials for m in messages):
            found.append(None)
            continue
        key = (*(m["role"] for m in messages), text[last:])
        if key not in tails:
            ids = encode(tokenizer, [(messages[:-1], True)])[0]
            frame = {
                number for spelling, number in specials.items() if spelling in text
            }  # others, as <unk>, stand for a message's words
            marks = [i for i, t in enumerate(ids) if t in frame]
            known = (
                bool(marks) and ids[marks[-1]] == specials[token]
            )  # the last one in the text is the last one among the tokens
            tails[key] = ([ids[i] for i in marks], ids[marks[-1] + 1 :]) if known else ([], [])
        marks, tail = tails[key]
        if not marks:
            found.append(None)
            continue
        at = -1
        for mark in marks:
            at = whole.index(mark, at + 1)
        found.append(whole[: at + 1] + tail)
    rest = iter(
        encode(
            tokenizer,
            [(messages[:-1], True) for messages, ids in zip(conversations, found) if ids is None],
        )
    )
    return [next(rest) if ids is None else ids for ids in found]


def encode_examples(
    tokenizer, conversations: list[Conversation], supervise: str = "note"
) -> list[Example]:
    """Tokens and labels of conversations, each up to and including the EOS of its last assistant turn.

    The prompt's tokens are exactly those that generation will feed. Where the template's text tokenises differently as a whole
    (trl#6105), the answer is tokenised on its own behind the prompt. An answer that the template ends without an EOS gets one
    (trl#7230: an EOS never supervised is never learned)."""
    # The messages up to and including each answer; pre-training takes all up to the last one.
    turns = [
        [t for t, m in enumerate(c.messages) if m["role"] == "assistant"] for c in conversations
    ]
    turns = [ts[-1:] for ts in turns] if supervise == "all" else turns
    upto = [c.messages[: t + 1] for c, ts in zip(conversations, turns) for t in ts]
    wholes = encode(tokenizer, [(messages, False) for messages in upto])
    prompts = [[]] * len(wholes) if supervise == "all" else encode_prompts(tokenizer, upto, wholes)
    answers, eos = iter(zip(upto, prompts, wholes)), tokenizer.eos_token_id
    examples = []
    for conversation, ts in zip(conversations, turns):
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for messages, prompt, whole in (next(answers) for _ in ts):
            if whole[: len(prompt)] != prompt:
                whole = (
                    prompt
                    + tokenizer(
                        messages[-1]["content"], add_special_tokens=False, split_special_tokens=True
                    )["input_ids"]
                )
            answer = whole[len(prompt) :]
            if (
                eos in answer
            ):  # the template's own line break behind the EOS is not part of the answer
                answer = answer[: len(answer) - answer[::-1].index(eos)]
            else:
                answer = [*answer, eos]
            if prompt[: len(ids)] != ids:
                raise ConfigError(
                    f"id {conversation.id}: the chat template rewrites earlier turns; train on one turn at a time"
                )
            ids = prompt + answer
            spans.append((len(prompt), len(ids)))
        input_ids = np.asarray(ids, np.int32)
        labels = np.full_like(input_ids, IGNORE)
        for start, end in [(1, len(ids))] if supervise == "all" else spans:
            labels[start:end] = input_ids[start:end]
        examples.append(Example(conversation.id, input_ids, labels, conversation.weight))
    return examples
