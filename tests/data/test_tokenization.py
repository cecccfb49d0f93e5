"""Which tokens an example has, and which are supervised, under every chat template."""

import random
import shutil

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from loop.config.schema import ConfigError
from loop.data.conversations import Conversation
from loop.data.soap import soap_messages
from loop.data.tokenization import (
    PLAIN_TEMPLATE,
    Example,
    encode,
    encode_examples,
    encode_prompts,
    render,
)
from loop.generation.sharded import prompt_of
from loop.model.loading import load_tokenizer

ROWS = [
    {
        "id": f"r{i}",
        "dialogue": f"Doctor: How are you, {i}?\nPatient: Pain, 7/10.",
        "soap": f"S: Pain {i}.\nO: -\nA: x\nP: y",
    }
    for i in range(6)
]

ZEPHYR = (  # TinyLlama's; its role tags are ordinary text
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}"
    "{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma's: the role tags are special tokens without a name, and the template ends a turn with one
# of them instead of the EOS.
UNNAMED = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "<end>").replace(
    "<|im_start|>", "<start>"
)
TEMPLATES = {  # template, end of sequence, further special tokens
    "own": (None, "</s>", []),
    "none": (PLAIN_TEMPLATE, "</s>", []),
    "zephyr": (ZEPHYR, "</s>", []),
    "unnamed": (UNNAMED, "</s>", None),
    "llama3": (LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "chatml": (CHATML, "<|im_end|>", ["<|im_start|>"]),
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    template, eos, specials = TEMPLATES[request.param]
    if specials is None:
        tokenizer.add_tokens(
            [AddedToken("<start>", special=True), AddedToken("<end>", special=True)],
            special_tokens=True,
        )
        assert tokenizer.convert_tokens_to_ids("<end>") not in tokenizer.all_special_ids
    else:
        tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": specials})
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def talk(dialogue: str, note: str, key: str = "a") -> Conversation:
    return Conversation(key, soap_messages(dialogue, note), dialogue, note)


def test_the_note_and_its_eos_are_supervised_and_nothing_else(tokenizer):
    conversations = [talk(r["dialogue"], r["soap"], r["id"]) for r in ROWS]
    for e, row in zip(encode_examples(tokenizer, conversations), ROWS):
        supervised = e.input_ids[e.labels != -100]
        assert supervised[-1] == tokenizer.eos_token_id == e.input_ids[-1]
        assert tokenizer.decode(supervised, skip_special_tokens=True).strip() == row["soap"]
        prompt = encode(tokenizer, [(soap_messages(row["dialogue"]), True)])[0]
        # What generation feeds is what training saw.
        assert e.input_ids[: len(prompt)].tolist() == prompt
        assert np.array_equal(e.labels[len(prompt) :], e.input_ids[len(prompt) :])
        assert (e.labels[: len(prompt)] == -100).all()


def test_the_spelling_of_a_special_token_stays_text(tokenizer):
    specials = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    note = "S: he said " + " ".join(specials) + " and left.\nO: -\nA: x\nP: y"
    plain, injected = (
        encode_examples(tokenizer, [talk(d, note)])[0]
        for d in ("Doctor: hi", "Doctor: hi " + "".join(specials))
    )
    count = [
        sum(int(i) in tokenizer.all_special_ids for i in e.input_ids) for e in (plain, injected)
    ]
    frame = encode_examples(tokenizer, [talk("Doctor: hi", "S: ok")])[0]
    assert count[0] == count[1] == sum(int(i) in tokenizer.all_special_ids for i in frame.input_ids)
    supervised = injected.input_ids[injected.labels != -100]
    assert (
        tokenizer.decode(supervised, skip_special_tokens=True).strip() == note
        and tokenizer.eos_token_id not in supervised[:-1]
    )


def test_a_template_without_an_eos_gets_one(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (e,) = encode_examples(tokenizer, [talk("Doctor: hi", "S: ok")])
    assert e.input_ids[-1] == e.labels[-1] == tokenizer.eos_token_id


def test_prompts_are_found_without_tokenising_them(tokenizer):
    """`PromptCache` gives what `encode` does, spellings of special tokens included."""
    specials = "".join(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    dialogues = [r["dialogue"] for r in ROWS] + [
        "Doctor: " + specials,
        "Doctor: ends in a line break\n\n",
        "Doctor: é\u4e2d\U0001f600 x  y",
    ]
    upto = [soap_messages(d, "S: ok\nP: rest") for d in dialogues]
    # The conversation is encoded in pieces then, its prompt is not.
    upto.append(soap_messages("Doctor: hi  \n there", "S: he said " + specials))
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    upto += [
        first,
        [*first, {"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}],
    ]
    encoded = encode(tokenizer, [(m, False) for m in upto])
    expected = encode(tokenizer, [(m[:-1], True) for m in upto])
    texts = [render(tokenizer, m, False) for m in upto]
    assert encode_prompts(tokenizer, upto, texts, encoded) == expected


def test_a_base_without_a_template_gets_the_plain_one(tiny_base, tmp_path):
    bare = shutil.copytree(tiny_base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    # At once: the template is part of a run's identity, whether a cache is read or not.
    tokenizer = load_tokenizer(str(bare))
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    (e,) = encode_examples(tokenizer, [talk("Doctor: hi", "S: ok")])
    text = tokenizer.decode(e.input_ids)
    assert text.endswith("Doctor: hi\n### assistant\nS: ok</s>") and "### system" in text
    assert tokenizer.decode(e.input_ids[e.labels != -100]) == "S: ok</s>"


def test_messages_supervise_every_assistant_turn(tiny_base):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    tokenizer = load_tokenizer(tiny_base)
    (e,) = encode_examples(tokenizer, [Conversation("a", turns)])
    # A sample note is written in the place of the last answer, with which it is compared.
    prompt = tokenizer.decode(prompt_of(e))
    assert "one" in prompt and prompt.count("b") and "two" not in prompt
    assert tokenizer.decode(e.input_ids[e.labels != -100]) == "one</s>two</s>"
    (e,) = encode_examples(tokenizer, [Conversation("a", turns)], "all")
    assert np.array_equal(e.labels[1:], e.input_ids[1:]) and e.labels[0] == -100


def test_truncation_and_padding_of_a_tokenizer_file_are_switched_off(tiny_base):
    """A tokenizer.json saved with truncation and padding on would silently cut notes off."""
    tokenizer = load_tokenizer(str(tiny_base))
    rows = [
        Conversation(str(i), soap_messages("Doctor: Hello. " * n, "S: well"))
        for i, n in enumerate((30, 1))
    ]
    before = encode_examples(tokenizer, rows)
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=4096, pad_id=tokenizer.eos_token_id)
    for one, other in zip(before, encode_examples(tokenizer, rows)):
        assert (
            len(one) > 16
            and one.input_ids.tolist() == other.input_ids.tolist()
            and one.labels.tolist() == other.labels.tolist()
        )


def with_bos(tokenizer):
    """As Llama's tokenizers: whoever does not say otherwise gets a BOS in front of each text."""
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos
    return tokenizer


def test_a_tokenizers_own_bos_is_never_added(tokenizer):
    """The template writes the BOS where the base has one: no second one, and none inside."""
    specials = "".join(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    conversations = [talk("Doctor: hi", "S: ok"), talk("Doctor: " + specials, "S: ok", "b")]
    before = encode_examples(tokenizer, conversations)
    after = encode_examples(with_bos(tokenizer), conversations)
    for one, other in zip(before, after):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()

    class Slow:
        """The same tokenizer without the library's fast backend."""

        is_fast = False

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **options):
            return tokenizer(*args, **options)

    slow = encode_examples(Slow(), conversations)
    assert [e.input_ids.tolist() for e in slow] == [e.input_ids.tolist() for e in before]


# The lead to an answer ends with a space, which the answer's own turn lacks.
OTHER_LEAD = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def test_where_the_prompt_is_no_prefix_the_answer_follows_the_prompt(tiny_base):
    """What generation is fed is what training saw, also where the template makes two texts."""
    tokenizer = with_bos(load_tokenizer(tiny_base))
    tokenizer.chat_template = OTHER_LEAD
    (prompt,) = encode(tokenizer, [(soap_messages("Doctor: hi"), True)])
    (whole,) = encode(tokenizer, [(soap_messages("Doctor: hi", "S: ok"), False)])
    assert whole[: len(prompt)] != prompt
    (e,) = encode_examples(tokenizer, [talk("Doctor: hi", "S: ok")])
    answer = tokenizer("S: ok", add_special_tokens=False)["input_ids"]
    assert e.input_ids.tolist() == [*prompt, *answer, tokenizer.eos_token_id]
    assert e.input_ids[e.labels != -100].tolist() == [*answer, tokenizer.eos_token_id]


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_base):
    """As one that writes its thoughts into the last answer alone."""
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ m['role'] + ': ' + (m['content'] + (' (end)' if loop.last else '')) + eos_token }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    ]
    with pytest.raises(ConfigError, match="id a: the chat template rewrites earlier turns"):
        encode_examples(tokenizer, [Conversation("a", turns)])


def test_the_first_token_is_no_target():
    ids = np.arange(5, dtype=np.int32)
    assert Example("a", ids, ids).num_targets == 4  # nothing predicts it


def test_a_template_that_draws_leaves_the_runs_generator_as_it_is(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template += "{{ [1, 2, 3, 4, 5, 6, 7, 8] | random }}"
    messages = [{"role": "user", "content": "Hello"}]
    before = random.getstate()
    texts = {render(tokenizer, messages, True) for _ in range(8)}
    assert len(texts) == 1 and random.getstate() == before
