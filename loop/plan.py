"""`./launch.sh plan`: the whole run before its first step: steps, tokens, fill, lengths, learning rate."""

import sys

import numpy as np

from .cli import exit_with_config_error, load_config
from .config import Config, ConfigError
from .data import load_examples
from .model import load_tokenizer
from .monitor import describe_plan, quiet_libraries
from .optim import cosine_lr
from .packing import make_plan


def plot(values: list[float], height: int = 8, width: int = 72) -> str:
    """A curve in plain text, top = the largest value."""
    width = min(width, len(values))
    columns = [values[i * (len(values) - 1) // max(1, width - 1)] for i in range(width)]
    top = max(columns) or 1.0
    rows = ["".join("█" if v / top >= (height - y - 0.5) / height else " " for v in columns).rstrip() for y in range(height)]
    return "\n".join(f"{top * (height - y) / height:9.1e} |{row}" for y, row in enumerate(rows))


def show_plan(config: Config, lengths: np.ndarray, targets: np.ndarray, dropped: list[str]) -> str:
    """Steps, tokens, fill, the lengths' histogram and the learning rate of the whole run."""
    plan = make_plan(lengths, config.tokens_per_step, config.seed, config.epochs, config.max_steps)
    rows = config.batch_size if config.micro_batch_size == "auto" else config.micro_batch_size
    counts, edges = np.histogram(lengths, bins=8, range=(0, config.max_seq_len))
    histogram = [f"{int(a):6,}-{int(b):<6,} {'#' * int(50 * c / max(counts))} {c:,}" for a, b, c in zip(edges, edges[1:], counts)]
    lr = [cosine_lr(s, len(plan), config.lr, warmup_steps=config.warmup_steps, min_lr=config.min_lr,
                    restart_steps=config.restart_steps, restart_mult=config.restart_mult) for s in range(len(plan))]  # fmt: skip
    return "\n".join([
        describe_plan(plan, lengths, targets, config, 1, rows),
        f"dropped     {len(dropped):,} longer than {config.max_seq_len:,} tokens {', '.join(dropped[:5])}",
        "", "tokens of an example", *histogram, "", f"learning rate over {len(plan):,} steps", plot(lr),
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """`plan [--config FILE] [key=value ...]`"""
    quiet_libraries()
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        examples, dropped = load_examples(config, load_tokenizer(config.base, config.revision), "train")
        print(show_plan(config, np.array([len(e) for e in examples]), np.array([e.num_targets for e in examples]), dropped))
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
