"""The prompt that a model was trained with: what trained.json says of it, and the task it tells."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config.schema import ConfigError, TaskConfig
from ..data.soap import SOAP


def prompt_texts(task: TaskConfig = SOAP) -> dict[str, Any]:
    """What the task's prompt says: `system`, `request`, and `headings` ({"S": "Subjective"})."""
    return {"system": task.system, "request": task.request, "headings": task.headings}


def describe_prompt(tokenizer, task: TaskConfig = SOAP) -> dict[str, Any]:
    """`prompt` in trained.json: the texts and two hashes of SHA-256, in hex.

    `sha256` is of `prompt_texts`, `chat_template_sha256` of what the tokenizer puts around them.
    """
    texts = prompt_texts(task)
    return texts | {
        "sha256": _sha256(json.dumps(texts)),
        "chat_template_sha256": _sha256(str(tokenizer.chat_template)),
    }


def task_of(trained: dict[str, Any], default: TaskConfig = SOAP) -> TaskConfig:
    """The task that a model was trained for, by its trained.json; `default` where it names none.

    It names none for older runs and other projects, and for rows that brought their own prompts.
    Raises ConfigError where its texts are no task.
    """
    recorded = trained.get("prompt") or {}
    if not isinstance(recorded, dict):
        raise ConfigError(f"trained.json is broken: prompt is a {type(recorded).__name__}")
    known = {key: recorded.get(key) for key in TaskConfig.model_fields}
    texts = {key: value for key, value in known.items() if value is not None}
    if not texts:
        return default
    try:
        return TaskConfig(**texts)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"trained.json is broken: prompt, {what}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_prompt(option: str, folder: str, tokenizer) -> None:
    """Raises ConfigError where a folder's model can't be asked with the prompt of its training.

    That is where the tokenizer's chat template is another one, or the texts in trained.json are no
    longer those of the hash beside them. A folder whose trained.json names no prompt passes: those
    of older runs and of other projects, and those of rows that brought their own prompts. So does
    one without trained.json.

    Args:
        option: what the folder was given by, for the message: "--adapter" or "--base".
        folder: of an adapter or a model.
        tokenizer: the one that the prompts will be made with.
    """
    path = Path(folder) / "trained.json"
    if not path.is_file():
        return
    try:
        trained = json.loads(path.read_text())
        recorded = trained.get("prompt") or {}
        hashes = {key: recorded.get(key) for key in ("sha256", "chat_template_sha256")}
        own = describe_prompt(tokenizer, task_of(trained))
    except (ConfigError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{option} {folder}: trained.json is broken ({type(error).__name__})"
        ) from error
    names = {
        "sha256": "another prompt than trained.json says now",
        "chat_template_sha256": "another chat template than the base's tokenizer has",
    }
    for key, name in names.items():
        if hashes[key] not in (None, own[key]):
            raise ConfigError(
                f"{option} {folder}: was trained with {name} (hash {str(hashes[key])[:8]}, not "
                f"{own[key][:8]}), so it may write worse notes; use the folder and the base of the "
                "training as they were, or --any-prompt"
            )
