"""Notes from dialogues: `./launch.sh generate --adapter DIR --dialogue FILE`, and the sample notes of a run."""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from peft import PeftModel

from .cli import exit_with_config_error
from .config import ConfigError
from .distributed import on_gpu
from .model import attach_adapter, load_base, load_tokenizer, read_adapter
from .soap import soap_messages
from .tokens import encode
from .watchdog import doing


@torch.no_grad()
def write_notes(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, synced: bool = False, stop=None) -> list[str]:
    """Greedy notes for prompts of token ids, as one left-padded batch with a KV cache. synced: several ZeRO-3 ranks run on
    until the last one has finished, since each of them must take part in every gather. With `stop`, a StopRequest, the notes break
    off when it is set; a rank that was not asked itself writes its own to the end."""
    config, was_training = model.config, model.training
    packed, cache = config._attn_implementation, config.use_cache
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    def asked_to_stop(ids, scores, **_) -> torch.Tensor:  # transformers asks after each token
        doing(f"writing sample notes, token {ids.shape[1] - width}")
        return torch.full((len(ids),), bool(stop and stop.signal), device=ids.device)

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        model.eval()
        inner.set_attn_implementation("sdpa")  # packed attention has no cache; torch's own takes the padding mask
        config.use_cache = True
        out = model.generate(
            input_ids=ids.to(inner.device), attention_mask=mask.to(inner.device), max_new_tokens=max_new_tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, synced_gpus=synced,
            stopping_criteria=[asked_to_stop],
        )  # fmt: skip
    finally:
        inner.set_attn_implementation(packed)
        config.use_cache = cache
        model.train(was_training)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, width:].cpu()]


def load_for_notes(adapter: str | None, base: str | None, device):
    """(model, tokenizer) for generation on one device, in the precision the adapter was trained on: `trained.json` beside it says."""
    if not adapter and not base:
        raise ConfigError("give --adapter DIR or --base DIR")
    trained = read_adapter(adapter) if adapter else {"base": base, "revision": None, "method": "none", "double_quant": True, "dtype": "bfloat16"}
    base, revision = base or trained["base"], trained["revision"]
    tokenizer = load_tokenizer(base, revision)
    dtype = getattr(torch, trained["dtype"])
    model = load_base(base, dtype, device, revision=revision, quantized=trained["method"] == "qlora", double_quant=trained["double_quant"])
    if adapter:
        model = attach_adapter(model, adapter)
    return model.eval(), tokenizer


def prompt_ids(tokenizer, dialogue: str) -> list[int]:
    """The prompt exactly as training tokenised it."""
    return encode(tokenizer, [(soap_messages(dialogue), True)])[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch.sh generate", description="Write the SOAP note of a dialogue.")
    parser.add_argument("--adapter", help="a run's adapter/ folder; without it the base answers alone")
    parser.add_argument("--base", help="the base, where it is not the one the adapter names")
    parser.add_argument("--dialogue", default="-", help="a text file with the dialogue, or - for standard input")
    parser.add_argument("--max-new-tokens", type=int, default=600)
    args = parser.parse_args(argv)
    from .monitor import quiet_libraries

    quiet_libraries()
    try:
        if args.dialogue == "-":
            dialogue = sys.stdin.read()
        else:
            try:
                dialogue = Path(args.dialogue).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--dialogue {args.dialogue}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
        if not dialogue.strip():
            raise ConfigError(f"--dialogue {args.dialogue}: the dialogue is empty")
        model, tokenizer = load_for_notes(args.adapter, args.base, "cuda:0" if on_gpu() else "cpu")
    except ConfigError as error:
        exit_with_config_error(error)
    with contextlib.suppress(BrokenPipeError):
        print(write_notes(model, tokenizer, [prompt_ids(tokenizer, dialogue)], args.max_new_tokens)[0])


if __name__ == "__main__":
    main()
