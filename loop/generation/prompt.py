"""The prompt that a model was trained with, compared with the one that this code writes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config.schema import ConfigError
from ..data.soap import HEADINGS, NAMES, REQUEST, SYSTEM


def prompt_texts() -> dict[str, Any]:
    """What this code's prompt says: `system`, `request`, and `headings` ({"S": "Subjective"})."""
    return {
        "system": SYSTEM,
        "request": REQUEST,
        "headings": {heading: NAMES[heading] for heading in HEADINGS},
    }


def describe_prompt(tokenizer) -> dict[str, Any]:
    """`prompt` in trained.json: the texts and two hashes of SHA-256, in hex.

    `sha256` is of `prompt_texts`, `chat_template_sha256` of what the tokenizer puts around them.
    """
    texts = prompt_texts()
    return texts | {
        "sha256": _sha256(json.dumps(texts)),
        "chat_template_sha256": _sha256(str(tokenizer.chat_template)),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_prompt(option: str, folder: str, tokenizer) -> None:
    """Raises ConfigError where a folder's model was trained with another prompt than this code's.

    A folder whose trained.json names no prompt passes: those of older runs and of other projects,
    and those of rows that brought their own prompts. So does one without trained.json.

    Args:
        option: what the folder was given by, for the message: "--adapter" or "--base".
        folder: of an adapter or a model.
        tokenizer: the one that the prompts will be made with.
    """
    path = Path(folder) / "trained.json"
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_text()).get("prompt") or {}
        hashes = {key: recorded.get(key) for key in ("sha256", "chat_template_sha256")}
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{option} {folder}: trained.json is broken ({type(error).__name__})"
        ) from error
    own = describe_prompt(tokenizer)
    names = {
        "sha256": "another prompt than this version writes",
        "chat_template_sha256": "another chat template than the base's tokenizer has",
    }
    for key, name in names.items():
        if hashes[key] not in (None, own[key]):
            raise ConfigError(
                f"{option} {folder}: was trained with {name} (hash {str(hashes[key])[:8]}, not "
                f"{own[key][:8]}), so it may write worse notes; use the version and the base that "
                "trained it, or --any-prompt"
            )
