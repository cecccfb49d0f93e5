"""Every chat template: the prompt of training is that of generation, and the note is learned alone.

The templates are those that TRL ships, read from where it is installed, and shapes of our own.
"""

import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT

from loop.config.schema import ConfigError
from loop.data import tokenization
from loop.data.conversations import Conversation
from loop.data.soap import SOAP, soap_messages
from loop.data.tokenization import encode, encode_examples, render
from loop.model.loading import load_tokenizer

DIALOGUE = "Doctor: Any pain?\nPatient: In my left knee, for 3 days."
NOTE = "S: Left knee pain for 3 days.\nO: -\nA: Knee pain.\nP: Rest."
OUTER = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
SHAPES = {  # our own, each with what a family's templates do
    "the system goes with the last user": (
        "{% set s = messages[0].content if messages[0].role == 'system' else none %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "<|user|>{% if loop.last and s %}{{ s + '\n' }}{% endif %}{{ m.content }}<|assistant|>"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "a block of thoughts is opened": (
        OUTER + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "an empty block before answers alone": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "thoughts in tags of another kind": (
        OUTER + "{% if add_generation_prompt %}<|assistant|>{{ '<|START_THINKING|>' }}{% endif %}"
    ),
    "a switch": (
        OUTER + "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{% endif %}"
    ),
    "no system role": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + OUTER
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "contents in parts": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "draws": "{{ range(99) | list | random }}" * 9 + OUTER,
    "answers are not written": "{{ messages[0].content + '\n' + messages[1].content + '\n' }}",
}
SPECIAL = r"<\|?[A-Za-z][\w/▁｜ -]*\|?>|<｜[^<>]+｜>|\[[A-Z_]+\]"


def templates() -> dict[str, str]:
    """{name: text} of all of them."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found else Path("-")
    shipped = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}
    return shipped | SHAPES


TEMPLATES = templates()


@pytest.fixture
def tokenizer():
    return load_tokenizer(str(ROOT / "loop" / "embedded" / "base"))


def use(tokenizer, template: str) -> None:
    """The template, with the tags that it spells as special tokens, as in its family."""
    tags = sorted(set(re.findall(SPECIAL, template)) - {"<think>", "</think>"})
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    tokenizer.chat_template = template


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_has_the_prompt_of_generation_and_the_note_alone(tokenizer, name):
    use(tokenizer, TEMPLATES[name])
    talks = [DIALOGUE, DIALOGUE + "\nDoctor: Rest.", DIALOGUE + " <think> </s>"]
    rows = [Conversation(str(i), soap_messages(d, NOTE), d, NOTE) for i, d in enumerate(talks)]
    everything = encode_examples(tokenizer, rows, "all")
    for example, full, dialogue in zip(encode_examples(tokenizer, rows), everything, talks):
        assert (full.input_ids == example.input_ids).all() and (full.labels[1:] != -100).all()
        (prompt,) = encode(tokenizer, [(soap_messages(dialogue), True)])
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert (example.labels[: len(prompt)] == -100).all()
        answer = example.input_ids[len(prompt) :]
        assert (example.labels[len(prompt) :] == answer).all()
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == NOTE
    text = render(tokenizer, soap_messages(DIALOGUE), True)
    asked = SOAP.request.strip()
    assert SOAP.system in text and asked in text and DIALOGUE in text
    frame = text.partition(DIALOGUE)[2]
    assert frame.count("<think>") == frame.count("</think>")
    assert frame.count("<|START_THINKING|>") == frame.count("<|END_THINKING|>")
    assert not re.search(r"<think>\s*\S+\s*</think>", frame)


def test_without_a_system_role_its_text_is_a_paragraph_before_the_users(tokenizer):
    use(tokenizer, SHAPES["no system role"])
    text = render(tokenizer, soap_messages(DIALOGUE), True)
    assert f"<|user|>{SOAP.system}\n\n{SOAP.request}{DIALOGUE}" in text


def test_two_turns_of_templates_whose_eos_is_behind_the_last_answer_alone(tokenizer):
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    ]
    ends = {"": "one<|end|>\ntwo<|end|>\n</s>", "{{ eos_token }}": "one<|end|>\ntwo<|end|>\n</s>"}
    for last, supervised in ends.items():
        use(
            tokenizer,
            OUTER.replace("'<|end|>'", "'<|end|>\n'")
            + "{% if add_generation_prompt %}<|assistant|>{% else %}"
            + last
            + "{% endif %}",
        )
        (e,) = encode_examples(tokenizer, [Conversation("a", turns)])
        assert tokenizer.decode(e.input_ids[e.labels != -100]) == supervised
    use(tokenizer, SHAPES["an empty block before answers alone"])  # the same in every turn
    (e,) = encode_examples(tokenizer, [Conversation("a", turns)])
    assert tokenizer.decode(e.input_ids[e.labels != -100]) == "one<|end|>two<|end|></s>"


def test_a_chat_that_the_template_refuses_is_named(tokenizer):
    turn = "(m.role == 'user') != (loop.index0 % 2 == 0)"
    use(
        tokenizer,
        OUTER.replace(
            "%}{{", f"%}}{{% if {turn} %}}{{{{ raise_exception('x') }}}}{{% endif %}}{{{{", 1
        ),
    )
    for roles in (("user", "user", "assistant"), ("user", "assistant", "assistant")):
        turns = [{"role": role, "content": "knee"} for role in roles]
        with pytest.raises(ConfigError, match="^id a: the base's chat template refuses .*: x: ch"):
            encode_examples(tokenizer, [Conversation("a", turns)])


def test_a_date_in_a_template_is_the_same_on_every_day(tokenizer):
    for call in (
        "{{ strftime_now('%d %b %Y') }}",
        "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}",
        "{% macro day() -%}{{ strftime_now(format='%d ' + '%b %Y') }}{%- endmacro %}{{ day() }}",
    ):
        use(tokenizer, call + OUTER)
        text = render(tokenizer, soap_messages(DIALOGUE), True)
        assert text.startswith(tokenization.DATE.strftime("%d %b %Y"))


def test_a_template_that_drops_a_message_is_refused_in_one_line(tokenizer):
    use(tokenizer, "{{ messages[-1].content[:4] }}")
    with pytest.raises(ConfigError, match="chat template refuses .*: it does not write all") as e:
        encode(tokenizer, [(soap_messages(DIALOGUE), True)])
    assert "knee" not in str(e.value) and "\n" not in str(e.value)


def test_a_template_that_writes_the_answer_first_is_refused(tokenizer):
    """The other messages would be learned as the note's end."""
    use(tokenizer, OUTER.replace("in messages", "in messages | reverse"))
    with pytest.raises(ConfigError, match="it writes an answer before other messages"):
        encode(tokenizer, [(soap_messages(DIALOGUE), True)])


@pytest.mark.parametrize("change", ["[:60]", " | replace('e', 'x')", " | upper", " | tojson"])
def test_a_template_that_changes_words_is_refused_in_one_line(tokenizer, change):
    use(tokenizer, OUTER.replace("m.content", f"(m.content{change})"))
    with pytest.raises(ConfigError, match="changes or leaves out words of .* system, user") as e:
        encode(tokenizer, [(soap_messages(DIALOGUE), True)])
    assert "knee" not in str(e.value) and "\n" not in str(e.value)
