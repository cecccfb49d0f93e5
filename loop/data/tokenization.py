"""From conversations to token ids and labels.

Labels supervise the assistant's answers, their end-of-sequence tokens included, and nothing else.
Training and generation encode prompts by the same functions.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jinja2
import numpy as np

from ..config.schema import ConfigError
from ..untrusted.limits import LimitError, limited
from .conversations import Conversation

Messages = list[dict[str, str]]  # each with "role" and "content"


class RefusedChatError(ConfigError):
    """The base's chat template refuses this one chat, as others may be in order."""


IGNORE = -100  # the label of a token that is not supervised, as everywhere in the field
# For a base that brings no chat template of its own.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '### ' + m['role'] + '\n' + m['content'] "
    "+ (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


# A model that can think aloud before its answer must not: the note is what is asked for. Each
# family has a switch of its own, and a template ignores what it does not know.
THINKING_OFF = {
    "enable_thinking": False,
    "thinking": False,
    "reasoning": False,
    "thinking_budget": 0,
}
# A tag that opens a block of thoughts: <think>, [THINK], <|START_THINKING|>, <seed:think>.
THOUGHTS_BEGIN = re.compile(
    r"[<\[◁](?![^\s<>]*end)[^\s<>/\[\]]*(?:think|thought|reasoning)[^\s<>/\[\]]*[>\]▷]",
    re.IGNORECASE,
)
# A date in a template is always the same one: a run resumed tomorrow has the prompts of today.
DATE = datetime.datetime(2026, 1, 1)
DATE_CODES = [f"%{pad}{letter}" for letter in "aAbBcdeFHIjmMpSTuwxXyYZz" for pad in ("-", "")]


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


# ---- the template


class ChatFrame(NamedTuple):
    """What the base's chat template does with conversations of the same roles, seen by running it.

    Example: a template that writes `<think>\n\n</think>\n\n` before each answer, but not at the end
    of a prompt. That text is the `lead`: part of the prompt, so never of the note.
    """

    arrange: Callable[[Messages], list[dict]]  # puts messages into the form that it takes
    lead: str  # what the prompt has behind the template's own text
    end: str | None  # what the template writes behind the answer; None: it writes no answer


def _as_they_are(messages: Messages) -> list[dict]:
    return list(messages)


def _system_with_user(messages: Messages) -> list[dict]:
    """The system's text at the head of the user's first message."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return list(messages)
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]


def _in_parts(messages: Messages) -> list[dict]:
    """Contents as lists of parts, as templates of models that see images want them."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


ARRANGEMENTS = (
    _as_they_are,
    _system_with_user,
    _in_parts,
    lambda messages: _in_parts(_system_with_user(messages)),
)


def render(tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """The text that the base's chat template makes of a conversation.

    With `add_generation_prompt` it is the prompt of an answer that comes next. Raises ConfigError
    where the template refuses the conversation.
    """
    roles = tuple(m["role"] for m in messages)
    if not add_generation_prompt and roles[-1] == "assistant":
        roles = roles[:-1]
    frame = _find_frame(tokenizer, str(tokenizer.chat_template), roles)
    if not add_generation_prompt and frame.end is None:
        return ""  # it would raise, or leave the answer out
    try:
        text = _apply(tokenizer, frame.arrange(messages), add_generation_prompt)
    except _TEMPLATE_ERRORS as error:  # without its message, which may quote the conversation
        raise ConfigError(
            f"the base's chat template refuses a conversation of {', '.join(roles)}: "
            f"{type(error).__name__}"
        ) from error
    # Once an answer follows, some templates write the messages before it otherwise.
    if not all(_is_written(m, text) for m in messages[0 if add_generation_prompt else -1 :]):
        raise ConfigError(
            f"the base's chat template changes or leaves out words of a conversation of "
            f"{', '.join(roles)}; give the base another template"
        )
    return text + frame.lead if add_generation_prompt else text


def _is_written(message: dict[str, str], text: str) -> bool:
    """Whether a conversation's text holds the message's own.

    Templates write a tool's output in their own way, and leave out the thoughts of an answer.
    """
    content = message["content"].strip()
    if content in text or message["role"] == "tool":
        return True
    return message["role"] == "assistant" and "think>" in content


# A template's own, and what it does with a content of another type than it expects.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    AttributeError,
    LookupError,
    ValueError,  # also a lone surrogate, which is no text
    ArithmeticError,
)


def _apply(tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    """The template is a stranger's program: it runs in a sandbox, within limits."""
    arguments: dict[str, Any] = {**THINKING_OFF, "tokenize": False}
    template = tokenizer.get_chat_template()
    try:
        with limited(), _same_draws(template):
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=_with_fixed_date(template),
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
            text.encode()
            return text
    except LimitError as error:
        raise ConfigError(f"the base's chat template {error}; take another base") from error


@functools.lru_cache
def _with_fixed_date(template: str) -> str:
    """The template with a `strftime_now` of its own, which knows one date."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace({code!r}, {DATE.strftime(code)!r})" for code in DATE_CODES)
    macro = "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}"
    return macro + template


@contextlib.contextmanager
def _same_draws(template: str) -> Iterator[None]:
    """A context in which a template that draws, as jinja2 lets it, always draws the same."""
    if not re.search("random|lipsum", template):
        yield
        return
    before = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(before)


def _placeholder(number: int) -> str:
    """Stands for a message's content: private-use characters, which no template writes."""
    return f"\ue000{number}\ue001"


@functools.lru_cache(maxsize=256)
def _find_frame(tokenizer, template: str, roles: tuple[str, ...]) -> ChatFrame:
    """The frame of prompts of messages with these roles. Raises ConfigError.

    The first arrangement counts under which the template writes every message. template: the
    tokenizer's, as a key of the cache.
    """
    messages = [{"role": role, "content": _placeholder(i)} for i, role in enumerate(roles)]
    answer = {"role": "assistant", "content": _placeholder(len(roles))}
    problem = "it does not write all of its messages"
    for arrange in ARRANGEMENTS:
        try:
            prompt = _apply(tokenizer, arrange(messages), True)
        except _TEMPLATE_ERRORS as error:
            if arrange is _as_they_are:  # the conversation is made of placeholders: it can be shown
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        if all(m["content"] in prompt for m in messages):
            try:
                whole = _apply(tokenizer, arrange([*messages, answer]), False)
            except _TEMPLATE_ERRORS as error:
                if roles[-1] == "assistant":  # two answers in a row
                    problem = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                    continue
                whole = ""
            before, found, end = whole.rpartition(answer["content"])
            if found and "\ue000" in end:
                problem = "it writes an answer before other messages"
                continue
            tail = prompt[prompt.rfind("\ue001") + 1 :]
            return ChatFrame(arrange, _lead(tail, prompt, before), end if found else None)
    raise ConfigError(
        f"the base's chat template refuses a conversation of {', '.join(roles)}: {problem}"
    )


def _lead(tail: str, prompt: str, before: str) -> str:
    """The text between the template's own prompt and the answer.

    Args:
        tail: of the prompt, behind its last message.
        prompt: as the template ends it.
        before: what the template writes before the answer of a complete conversation.
    """
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    if lead.strip():
        return lead
    opened = THOUGHTS_BEGIN.findall(tail)
    if opened and (closing := closing_tag(opened[-1])) not in tail:  # whatever the switches say
        gap = "" if tail.endswith("\n") else "\n"
        return f"{gap}\n{closing}\n\n"
    return ""


def closing_tag(tag: str) -> str:
    """Example: </think> of <think>, <|END_THINKING|> of <|START_THINKING|>."""
    for start, end in (("START", "END"), ("start", "end"), ("begin", "end")):
        if start in tag:
            return tag.replace(start, end)
    return f"{tag[0]}/{tag[1:]}"


# ---- from text to token ids


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
    texts = [render(tokenizer, messages, prompt) for messages, prompt in conversations]
    return _encode_texts(tokenizer, conversations, texts)


def _encode_texts(
    tokenizer, conversations: list[tuple[Messages, bool]], texts: list[str]
) -> list[list[int]]:
    """As `encode`; texts: what `render` makes of the conversations."""
    specials = special_tokens(tokenizer)
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
    # While the template is rendered, placeholders stand for the contents.
    placeholders = [{**m, "content": _placeholder(i)} for i, m in enumerate(messages)]
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

    def prefix_of(self, messages: Messages, whole: str, ids: list[int]) -> list[int] | None:
        """The token ids of the prompt of a conversation, whose own are `ids`, of the text `whole`.

        None where they must be tokenised: the template has no special token, a message spells one,
        or the conversation's text does not begin with the prompt's. So it is with templates that
        write earlier messages otherwise once an answer follows.
        """
        text = render(self.tokenizer, messages[:-1], True)
        if not whole.startswith(text):
            return None
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
    tokenizer, conversations: list[Messages], texts: list[str], encoded: list[list[int]]
) -> list[list[int]]:
    """The token ids of the prompts of conversations, of these texts and token ids.

    A prompt is all messages but the last, and the template's lead to the answer. The result is that
    of `encode`, most of it read out of `encoded` (`PromptCache`).
    """
    cache = PromptCache(tokenizer)
    prompts = [cache.prefix_of(*row) for row in zip(conversations, texts, encoded)]
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
    tokens are exactly those that generation will feed. Raises RefusedChatError where the chat
    template refuses a chat or rewrites its earlier turns.
    """
    turns = [_assistant_turns(c, supervise) for c in conversations]
    flat = list(itertools.chain.from_iterable(turns))
    texts = [_render_turn(tokenizer, c, m) for c, own in zip(conversations, turns) for m in own]
    encoded = _encode_texts(tokenizer, [(messages, False) for messages in flat], texts)
    prompts = encode_prompts(tokenizer, flat, texts, encoded)
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
            # Some templates write the EOS behind the last answer alone.
            if prompt[: len(ids)] != ids and prompt[: len(ids) - 1] == ids[:-1]:
                ids.pop()
                spans[-1] = (spans[-1][0], len(ids))
            if prompt[: len(ids)] != ids:
                raise RefusedChatError(
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


def _render_turn(tokenizer, conversation: Conversation, messages: Messages) -> str:
    """As `render`; a chat that the template refuses is named, as other rows may be in order."""
    try:
        return render(tokenizer, messages, False)
    except ConfigError as error:
        if conversation.dialogue is not None:
            raise
        raise RefusedChatError(
            f"id {conversation.id}: {error}: change the chat or remove it"
        ) from error


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
    begin with the former, the answer is tokenised on its own, with the end that the template gives
    it. So it is where the template's text is tokenised differently at their border, and where it
    writes earlier messages otherwise once an answer follows (trl#5213). An answer that the template
    ends without an EOS gets one (trl#1623: an EOS that is never supervised is never learned).
    """
    eos = tokenizer.eos_token_id
    roles = tuple(m["role"] for m in messages[:-1])
    end = _find_frame(tokenizer, str(tokenizer.chat_template), roles).end
    if end is not None and ids[: len(prompt)] == prompt:
        answer = ids[len(prompt) :]
    else:
        content = messages[-1]["content"]
        answer = tokenizer(content, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        answer += tokenizer(end or "", add_special_tokens=False)["input_ids"]
    if eos not in answer:
        return [*answer, eos]
    # The template's own line break behind the EOS is not part of the answer.
    last_eos = len(answer) - 1 - answer[::-1].index(eos)
    return answer[: last_eos + 1]
