"""Loads a model to generate with, and fits dialogues to its context."""

import json
from pathlib import Path
from typing import Any

import torch

from ..config.device import has_fast_bf16
from ..config.schema import ConfigError, TaskConfig, check_path
from ..data.soap import SOAP, fit_dialogue, soap_messages
from ..data.tokenization import encode
from ..model.loading import load_base, load_tokenizer
from ..model.lora import attach_adapter, read_adapter, trained_quantization


def load_for_generation(adapter: str | None, base: str | None, device):
    """(model, tokenizer) for generation on one device.

    The base is stored as the adapter's training stored it. It computes in fp32 on a CPU that is
    slow in bf16. Arguments as in `generation_source`.
    """
    trained = generation_source(adapter, base)
    dtype = getattr(torch, trained["dtype"])
    if torch.device(device).type == "cpu" and not has_fast_bf16():
        dtype = torch.float32
    tokenizer = load_tokenizer(trained["base"], trained["revision"])
    model = load_base(
        trained["base"],
        dtype,
        device,
        revision=trained["revision"],
        quantization=trained_quantization(trained),
        double_quant=trained["double_quant"],
    )
    if adapter:
        model = attach_adapter(model, adapter)
    return model.eval(), tokenizer


def generation_source(adapter: str | None, base: str | None) -> dict:
    """The base to generate with, its revision, and how it is stored, with the keys of trained.json.

    `generation` and `prompt` are among them where a run of this project trained adapter or base:
    the settings of its own notes, and its task.

    adapter: a folder, or None for the base alone. base: replaces the one that the adapter names.
    Raises ConfigError for a folder that is no adapter, for a trained.json that is broken, and
    without adapter and base.
    """
    if not adapter and not base:
        raise ConfigError("give --adapter DIR or --base DIR")
    check_path("--base", base or "")
    if adapter:
        trained: dict[str, Any] = read_adapter(adapter)
    else:
        trained = {"revision": None, "method": "none", "double_quant": True, "dtype": "bfloat16"}
        trained |= _trained_model(str(base))
    return trained | {"base": base} if base else trained


def _trained_model(base: str) -> dict[str, Any]:
    """`generation` and `prompt` in the trained.json of a merged or a fully trained model, if any.

    Raises ConfigError where the file is broken.
    """
    path = Path(base) / "trained.json"
    if not path.is_file():
        return {}
    try:
        trained = json.loads(path.read_text())
        return {key: trained.get(key) for key in ("generation", "prompt")}
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"--base {base}: trained.json is broken ({type(error).__name__})"
        ) from error


def prompt_ids(
    tokenizer, dialogue: str, task: TaskConfig = SOAP, fields: dict[str, str] | None = None
) -> list[int]:
    """The token ids of a dialogue's prompt, exactly as in training.

    fields: what stands for each {NAME} of the task's request.
    """
    return encode(tokenizer, [(soap_messages(dialogue, None, task, fields), True)])[0]


def fit_dialogues(
    tokenizer,
    dialogues: dict[str, str],
    context: int,
    max_new_tokens: int,
    task: TaskConfig = SOAP,
    fields: dict[str, dict[str, str]] | None = None,
) -> dict[str, tuple[str, int]]:
    """{id: (dialogue, turns left out)}, so that prompt and note fit the base's context.

    A dialogue is shortened as in training, and only if it must be. Raises ConfigError naming the
    first id that cannot be made to fit.

    Args:
        tokenizer: the base's.
        dialogues: by id.
        context: tokens that the base can see, prompt and note together.
        max_new_tokens: of a note.
        task: of the prompt.
        fields: by id, what stands for each {NAME} of the task's request.
    """
    if context <= max_new_tokens:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: the base's context holds {context} tokens, "
            "the prompt included; give fewer"
        )
    limit = context - max_new_tokens
    fitted = {}
    for key, dialogue in dialogues.items():
        own = (fields or {}).get(key)
        shorter = fit_dialogue(
            dialogue, lambda text: len(prompt_ids(tokenizer, text, task, own)), limit
        )
        if shorter is None:
            raise ConfigError(
                f"id {key}: does not fit the base's context of {context:,} tokens beside a note of "
                f"{max_new_tokens}, whatever turns are left out: split its longest turn, or give "
                "fewer --max-new-tokens"
            )
        fitted[key] = shorter
    return fitted
