"""Notes from dialogues: `./launch.sh generate --adapter DIR --dialogue FILE`, or thousands with `--input FILE --output FILE`."""

from ..config.schema import ConfigError
from ..data.soap import fit_dialogue, soap_messages
from ..data.tokenization import encode
from ..model.loading import load_base, load_tokenizer
from ..model.lora import attach_adapter, read_adapter


def load_for_generation(adapter: str | None, base: str | None, device):
    """(model, tokenizer) for generation on one device, in the precision the adapter was trained on: `trained.json` beside it says."""
    import torch

    trained = generation_source(adapter, base)
    tokenizer = load_tokenizer(trained["base"], trained["revision"])
    model = load_base(
        trained["base"],
        getattr(torch, trained["dtype"]),
        device,
        revision=trained["revision"],
        quantized=trained["method"] == "qlora",
        double_quant=trained["double_quant"],
    )
    if adapter:
        model = attach_adapter(model, adapter)
    return model.eval(), tokenizer


def generation_source(adapter: str | None, base: str | None) -> dict:
    """The base with its revision, and how it is stored. Raises ConfigError for a folder that is no adapter."""
    if not adapter and not base:
        raise ConfigError("give --adapter DIR or --base DIR")
    trained = (
        read_adapter(adapter)
        if adapter
        else {"revision": None, "method": "none", "double_quant": True, "dtype": "bfloat16"}
    )
    return trained | ({"base": base} if base else {})


def prompt_ids(tokenizer, dialogue: str) -> list[int]:
    """The prompt exactly as training tokenised it."""
    return encode(tokenizer, [(soap_messages(dialogue), True)])[0]


def fit_dialogues(
    tokenizer, dialogues: dict[str, str], context: int, max_new_tokens: int
) -> dict[str, tuple[str, int]]:
    """{id: (dialogue, turns left out)}: shortened as in training where prompt and note would not fit the base's context, in tokens. Raises
    ConfigError naming the first id that can't be."""
    if context <= max_new_tokens:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: the base's context holds {context} tokens, the prompt included; give fewer"
        )
    fitted = {}
    for key, dialogue in dialogues.items():
        shorter = fit_dialogue(
            dialogue, lambda text: len(prompt_ids(tokenizer, text)), context - max_new_tokens
        )
        if shorter is None:
            raise ConfigError(
                f"id {key}: does not fit the base's context of {context:,} tokens beside a note of {max_new_tokens}, whatever turns "
                "are left out: split its longest turn, or give fewer --max-new-tokens"
            )
        fitted[key] = shorter
    return fitted
