"""The Modelfile with which Ollama imports a model's folder: its prompt is that of the training."""

import json

import jinja2

from ..config.schema import PLACEHOLDER, ConfigError, GenerationSettings
from ..data.tokenization import render

# Private-use characters, which stand for the texts while the chat template is rendered.
SYSTEM_MARK, DIALOGUE_MARK = "\ue000", "\ue001"
NO_TEMPLATE = """\
# TEMPLATE is missing: the base's chat template is not a plain frame around system text and
# conversation, so Ollama cannot be told of it here. Without one Ollama guesses. Write a TEMPLATE
# by hand that gives the text of chat_template.jinja, or take the recipe of README.md.
"""


def modelfile(
    tokenizer, prompt: dict, context: int, settings: GenerationSettings, source: str = "."
) -> str:
    """The text of a Modelfile that lies in the folder of a merged or full model.

    Args:
        tokenizer: the model's.
        prompt: of trained.json, with `system` and `request`.
        context: tokens that prompt and note may have together.
        settings: how the run wrote its notes; the longest note is taken from there.
        source: the folder, or the GGUF file in it.
    """
    request = prompt["request"]
    said = "# The message is the conversation alone; TEMPLATE puts the request before it."
    if PLACEHOLDER.search(request):
        prompt = prompt | {"request": ""}
        said = (
            f"# The message is the conversation, after: {json.dumps(request, ensure_ascii=False)}"
        )
    template = go_template(tokenizer, prompt)
    system = prompt["system"]
    lines = [
        "# ollama create NAME -f Modelfile",
        said,
        "# The notes are drafts: a clinician must review each one.",
        f"FROM {source}",
        f'TEMPLATE """{template}"""' if template else NO_TEMPLATE.strip(),
    ]
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [
        f"PARAMETER temperature {settings.temperature:g}",
        "# Ollama's own penalty counts the words of the conversation, which a note must use.",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {settings.max_new_tokens}",
    ]
    if settings.no_repeat_ngram or settings.forced_headings:
        lines.append(
            "# Ollama has no generation.no_repeat_ngram and no generation.forced_headings."
        )
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def go_template(tokenizer, prompt: dict) -> str | None:
    """The prompt's frame as a template of Ollama, made by the chat template itself.

    It is the rendered prompt, with .System and .Prompt where the system text and the conversation
    stand. A beginning-of-sequence token is left out, as Ollama adds it. Returns None where the
    chat template changes the texts, repeats them or their order, or can't be written so.
    """
    messages = [{"role": "user", "content": prompt["request"] + DIALOGUE_MARK}]
    if prompt["system"]:
        messages.insert(0, {"role": "system", "content": SYSTEM_MARK})
    try:
        text = render(tokenizer, messages, True)
    except (ConfigError, jinja2.TemplateError):
        return None
    before = ""
    found_system = "none"
    rest = text
    if prompt["system"]:
        before, found_system, rest = text.partition(SYSTEM_MARK)
    between, found_dialogue, after = rest.partition(DIALOGUE_MARK)
    frame = before + between + after
    marks_once = found_system and found_dialogue and not {SYSTEM_MARK, DIALOGUE_MARK} & {*frame}
    if not marks_once or prompt["request"] not in between:
        return None
    if '"""' in frame or "{{" in frame or "}}" in frame:
        return None
    system = "{{ .System }}" if prompt["system"] else ""
    template = f"{before}{system}{between}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}"
    return template.removeprefix(tokenizer.bos_token or "")
