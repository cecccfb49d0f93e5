"""Ollama's template gives the text of the chat template, or the Modelfile says that it is missing.

Ollama itself is not run: its template is filled in by hand.
"""

import re

import pytest
from helpers import ROOT

from loop.config.schema import GenerationSettings
from loop.data.soap import SOAP, soap_messages
from loop.data.tokenization import PLAIN_TEMPLATE, render
from loop.export.ollama import go_template, modelfile
from loop.generation.prompt import describe_prompt
from loop.model.loading import load_tokenizer

ZEPHYR = (  # TinyLlama's
    "{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token + '[INST] <<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' "
    "+ messages[1]['content'] + ' [/INST]' }}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(str(ROOT / "loop" / "embedded" / "base"))


@pytest.mark.parametrize("template", [None, ZEPHYR, CHATML, LLAMA_2, LLAMA_3, PLAIN_TEMPLATE])
def test_the_template_gives_the_prompt_of_the_training(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    text = modelfile(
        tokenizer, describe_prompt(tokenizer), 1024, GenerationSettings(max_new_tokens=300)
    )
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert found and system and system.group(1) == SOAP.system
    dialogue = "Doctor: {{ 5 }}?\nPatient: pain"
    filled = found.group(1).removesuffix("{{ .Response }}")
    filled = filled.replace("{{ .System }}", SOAP.system).replace("{{ .Prompt }}", dialogue)
    expected = render(tokenizer, soap_messages(dialogue), True)
    assert filled == expected.removeprefix(tokenizer.bos_token or "\0")
    assert SOAP.request in filled
    lines = text.splitlines()
    assert {"FROM .", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"} <= {*lines}
    assert {"PARAMETER num_ctx 1024", "PARAMETER num_predict 300"} <= {*lines}
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in lines


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[1]['content'] + messages[0]['content'] }}",  # another order
        "{{ messages[0]['content'] + messages[1]['content'] + messages[0]['content'] }}",
        "{{ messages[0]['content'] + messages[1]['content'][9:] }}",  # a part of the request
        "{{ '{{' + messages[0]['content'] + messages[1]['content'] }}",
        "{{ messages[1]['content'] }}",  # no system text
        "{{ raise_exception('no system role') }}",
    ],
)
def test_another_template_is_left_to_the_reader(tokenizer, template):
    tokenizer.chat_template = template
    prompt = describe_prompt(tokenizer)
    assert go_template(tokenizer, prompt) is None
    text = modelfile(tokenizer, prompt, 1024, GenerationSettings(max_new_tokens=300))
    assert "TEMPLATE is missing" in text and "\nTEMPLATE" not in text and "\nFROM ." in text
