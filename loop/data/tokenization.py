"""From conversations to token ids and labels.

Labels supervise the assistant's answers, their end-of-sequence tokens included, and nothing else.
Training and generation encode prompts by the same functions.
"""

import dataclasses
import itertools
import re
from typing import NamedTuple

import jinja2
import numpy as np

from ..config.schema import ConfigError
from ..untrusted.limits import LimitError, limited
from .conversations import Conversation

Messages = list[dict[str, str]]  # each with "role" and "content"

IGNORE = -100  # the label of a token that is not supervised, as everywhere in the field
# For a base that brings no chat template of its own.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '### ' + m['role'] + '\n' + m['content'] "
    "+ (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
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
        """Supervised tokens. The first token of a document is none: nothing predicts it."""
        return int((self.labels[1:] != IGNORE).sum())


def render(tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """The text that the base's chat template makes of a conversation. Raises ConfigError.

    The template is a stranger's program: it runs in a sandbox, within limits of time and memory.
    """
    try:
        with limited():
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            text.encode()  # a lone surrogate is no text
            return text
    except Exception as error:  # e.g. a template that knows no system role, or divides by zero
        if not isinstance(error, jinja2.TemplateError):
            what = str(error) if isinstance(error, LimitError) else type(error).__name__
            raise ConfigError(f"the base's chat template can't be used: {what}") from error
        roles = ", ".join(m["role"] for m in messages)
        raise ConfigError(
            f"the base's chat template refuses a conversation of {roles}: {type(error).__name__}"
        ) from error


def special_tokens(tokenizer) -> dict[str, int]:
    """The spelling and id of every token that the tokenizer matches before it splits text.

    These are more than `all_special_tokens`, which lacks a template's role tags in some bases.
    """
    return {
        str(token): token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def encode(tokenizer, conversations: list[tuple[Messages, bool]]) -> list[list[int]]:
    """The token ids of conversations, each (messages, add_generation_prompt).

    Text that spells a special token ("</s>") inside a message stays text.
    """
    specials = special_tokens(tokenizer)
    texts = [render(tokenizer, messages, prompt) for messages, prompt in conversations]
    encoded = _tokenize(tokenizer, texts)
    for i, (messages, add_generation_prompt) in enumerate(conversations):
        if _spells_special_token(messages, specials):
            encoded[i] = _encode_in_pieces(tokenizer, messages, add_generation_prompt)
    return encoded


def _tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # The backend's batch call uses all cores, and leaves out the offsets that nobody reads.
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False
    backend.no_truncation()  # tokenizer.json may have either switched on
    backend.no_padding()
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _spells_special_token(messages: Messages, specials: dict[str, int]) -> bool:
    return any(spelling in m["content"] for spelling in specials for m in messages)


def _encode_in_pieces(tokenizer, messages: Messages, add_generation_prompt: bool) -> list[int]:
    """The token ids of the template's frame and of the messages, tokenised piece by piece.

    Special tokens count in the frame; in the messages their spellings are text.
    """
    # While the template is rendered, private-use characters stand for the contents.
    placeholders = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    text = render(tokenizer, placeholders, add_generation_prompt)
    ids: list[int] = []
    for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
        is_content = i % 2 == 1  # every second piece is a message's number
        if is_content:
            piece = messages[int(piece)]["content"]
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=is_content)[
                "input_ids"
            ]
    return ids


class PromptFrame(NamedTuple):
    """The tokens of a prompt that the template writes, whatever the messages hold."""

    specials: list[int]  # ids of the special tokens, in order
    tail: list[int]  # ids of the text behind the last of them; often none


class PromptCache:
    """Finds the token ids of prompts in those of complete conversations, without tokenising twice.

    A prompt is a conversation without its last message, and the template's lead to the answer. A
    special token is a hard boundary: the text before it is tokenised the same, whatever follows. So
    a prompt has the conversation's tokens up to its own last special token, and then its tail: the
    template's text that follows. Special tokens and tail are the same for all conversations with
    the same roles, so they are found once and remembered.

    Example, with the special tokens <user>, <end> and <assistant>:

        conversation  <user> How are you ? <end> <assistant> \\n S : ok <end>
        prompt        <user> How are you ? <end> <assistant> \\n
        frame         specials: <user> <end> <assistant>, tail: \\n
        prefix_of     the conversation up to its first <user>, the next <end> and the next
                      <assistant>, and then \\n
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.specials = special_tokens(tokenizer)
        self.frames: dict[tuple[str, ...], PromptFrame | None] = {}  # by roles and tail's text

    def prefix_of(self, messages: Messages, ids: list[int]) -> list[int] | None:
        """The token ids of the prompt of a conversation, whose own are `ids`.

        None where they must be tokenised: the template has no special token, or a message spells
        one.
        """
        text = render(self.tokenizer, messages[:-1], True)
        found = [s for s in self.specials if s in text]
        if not found or _spells_special_token(messages, self.specials):
            return None
        end, last = max((text.rfind(s) + len(s), s) for s in found)
        key = (*(m["role"] for m in messages), text[end:])
        if key not in self.frames:
            self.frames[key] = self._find_frame(messages, text, last)
        frame = self.frames[key]
        if frame is None:
            return None
        position = -1
        for token in frame.specials:
            position = ids.index(token, position + 1)
        return ids[: position + 1] + frame.tail

    def _find_frame(self, messages: Messages, text: str, last: str) -> PromptFrame | None:
        """The frame of a prompt with this text, whose last special token is spelled `last`.

        None where that is not the last one among the prompt's tokens.
        """
        (ids,) = encode(self.tokenizer, [(messages[:-1], True)])
        # Other special tokens, as <unk>, stand for words of a message.
        written = {token for spelling, token in self.specials.items() if spelling in text}
        positions = [i for i, token in enumerate(ids) if token in written]
        if not positions or ids[positions[-1]] != self.specials[last]:
            return None
        return PromptFrame([ids[i] for i in positions], ids[positions[-1] + 1 :])


def encode_prompts(
    tokenizer, conversations: list[Messages], encoded: list[list[int]]
) -> list[list[int]]:
    """The token ids of the prompts of conversations, whose own token ids are `encoded`.

    A prompt is all messages but the last, and the template's lead to the answer. The result is that
    of `encode`, most of it read out of `encoded` (`PromptCache`).
    """
    cache = PromptCache(tokenizer)
    prompts = [cache.prefix_of(messages, ids) for messages, ids in zip(conversations, encoded)]
    missing = [
        (messages[:-1], True) for messages, ids in zip(conversations, prompts) if ids is None
    ]
    tokenized = iter(encode(tokenizer, missing))
    return [next(tokenized) if ids is None else ids for ids in prompts]


def encode_examples(
    tokenizer, conversations: list[Conversation], supervise: str = "note"
) -> list[Example]:
    """Token ids and labels of conversations, each up to the EOS of its last assistant turn.

    supervise: "note" for the assistant's turns, "all" for every token (pre-training). The prompt's
    tokens are exactly those that generation will feed. Raises ConfigError where the chat template
    rewrites earlier turns.
    """
    turns = [_assistant_turns(c, supervise) for c in conversations]
    flat = list(itertools.chain.from_iterable(turns))
    encoded = encode(tokenizer, [(messages, False) for messages in flat])
    if supervise == "all":
        prompts: list[list[int]] = [[]] * len(flat)
    else:
        prompts = encode_prompts(tokenizer, flat, encoded)
    answers = (
        _answer_ids(tokenizer, messages, prompt, ids)
        for messages, prompt, ids in zip(flat, prompts, encoded)
    )
    prompts_and_answers = zip(prompts, answers)
    examples = []
    for conversation, own_turns in zip(conversations, turns):
        ids: list[int] = []
        spans: list[tuple[int, int]] = []  # of the answers
        for prompt, answer in itertools.islice(prompts_and_answers, len(own_turns)):
            if prompt[: len(ids)] != ids:
                raise ConfigError(
                    f"id {conversation.id}: the chat template rewrites earlier turns; "
                    "train on one turn at a time"
                )
            ids = prompt + answer
            spans.append((len(prompt), len(ids)))
        if supervise == "all":
            spans = [(1, len(ids))]
        input_ids = np.asarray(ids, np.int32)
        labels = np.full_like(input_ids, IGNORE)
        for start, end in spans:
            labels[start:end] = input_ids[start:end]
        examples.append(Example(conversation.id, input_ids, labels, conversation.weight))
    return examples


def _assistant_turns(conversation: Conversation, supervise: str) -> list[Messages]:
    """The messages up to and including each answer; for "all", up to the last answer alone."""
    messages = conversation.messages
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    if supervise == "all":
        ends = ends[-1:]
    return [messages[:end] for end in ends]


def _answer_ids(tokenizer, messages: Messages, prompt: list[int], ids: list[int]) -> list[int]:
    """The token ids of the last message of a conversation, which end with the EOS.

    prompt, ids: the token ids of the prompt and of the whole conversation. Where the latter do not
    begin with the former, because the template's text is tokenised differently at their border
    (trl#6105), the answer is tokenised on its own. An answer that the template ends without an EOS
    gets one (trl#7230: an EOS that is never supervised is never learned).
    """
    eos = tokenizer.eos_token_id
    if ids[: len(prompt)] == prompt:
        answer = ids[len(prompt) :]
    else:
        content = messages[-1]["content"]
        answer = tokenizer(content, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
    if eos not in answer:
        return [*answer, eos]
    # The template's own line break behind the EOS is not part of the answer.
    last_eos = len(answer) - 1 - answer[::-1].index(eos)
    return answer[: last_eos + 1]
