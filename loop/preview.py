"""`./launch.sh preview`: the exact tokens that will be trained on, before anything is trained."""

import sys

from .cli import exit_with_config_error, load_config, take_options
from .config import ConfigError
from .data import IGNORE, Example, load_examples
from .model import load_tokenizer
from .monitor import quiet_libraries

GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"


def show_example(example: Example, tokenizer, color: bool) -> str:
    """The exact tokens of an example with a bar between them; supervised ones green, or in [brackets] without colour."""
    parts = []
    for token, label in zip(tokenizer.convert_ids_to_tokens(example.input_ids.tolist()), example.labels):
        text = tokenizer.convert_tokens_to_string([token]) if token not in tokenizer.all_special_tokens else token
        text = text.replace("\n", "\\n\n")
        on = label != IGNORE
        parts.append(f"{GREEN if on else DIM}{text}{RESET}" if color else f"[{text}]" if on else text)
    return f"{example.id}: {len(example)} tokens, {example.num_targets} supervised\n" + "|".join(parts)


def check_example(example: Example, tokenizer) -> None:
    """Raises ConfigError naming the example unless its last supervised token is the EOS."""
    if example.labels[-1] != tokenizer.eos_token_id:
        raise ConfigError(f"id {example.id}: the answer does not end in a supervised {tokenizer.eos_token!r}")


def main(argv: list[str] | None = None) -> None:
    """`preview [--rows N | --id ID] [--config FILE] [key=value ...]`"""
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        options = take_options(args, {"--rows": "1", "--id": None})
        if not options["--rows"].isdigit() or options["--rows"] == "0":
            raise ConfigError(f"--rows {options['--rows']}: must be a whole number of at least 1")
        config = load_config(args)
        tokenizer = load_tokenizer(config.base, config.revision)
        examples, _ = load_examples(config, tokenizer, "train")
        for example in examples:
            check_example(example, tokenizer)
        chosen = examples[: int(options["--rows"])] if options["--id"] is None else [e for e in examples if e.id == options["--id"]]
        if not chosen:
            raise ConfigError(f"--id {options['--id']}: no such example in data.train")
        print("\n\n".join(show_example(e, tokenizer, sys.stdout.isatty()) for e in chosen))
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
