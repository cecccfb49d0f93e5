"""`./launch.sh plan`: the whole run before its first step: what is left out, steps, tokens, fill, lengths, learning rate, time, memory."""

import json
import sys
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ..config.cli import load_config, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError
from ..data.batch_plan import plan_batches
from ..data.dataset import load_examples, visit_weights
from ..distributed.exit import exit_with_config_error, ignore_broken_pipe
from ..memory.report import describe_memory, read_gpus
from ..model.loading import load_model_config, load_tokenizer
from ..monitor.quiet import quiet_libraries
from ..monitor.summary import describe_plan, write_plan
from ..optim.schedule import learning_rates


def plot(values: list[float], height: int = 8, width: int = 72) -> str:
    """A curve in plain text, top = the largest value."""
    width = min(width, len(values))
    columns = [values[i * (len(values) - 1) // max(1, width - 1)] for i in range(width)]
    top = max(columns) or 1.0
    rows = [
        "".join("█" if v / top >= (height - y - 0.5) / height else " " for v in columns).rstrip()
        for y in range(height)
    ]
    return "\n".join(f"{top * (height - y) / height:9.1e} |{row}" for y, row in enumerate(rows))


def describe_time(tokens: int, given: str | None, config: Config) -> str:
    """How long the steps take at a given number of tokens/s, or at the last finished run's of this name."""
    report = config.folder / "report.json"
    rate, source = (float(given), "as given") if given else (None, "")
    if rate is None and report.is_file():
        rate, source = (
            json.loads(report.read_text()).get("train/tokens_per_second"),
            f"as measured in {config.folder}",
        )
    if not rate:
        return "time        not known before a first run; give --tokens-per-second N"
    return f"time        {tokens / rate / 60:,.0f} min at {rate:,.0f} tokens/s ({source}), without evaluation and saving"


@ignore_broken_pipe()
def main(argv: list[str] | None = None) -> None:
    """`plan [--gpus N] [--gpu-memory GIB] [--tokens-per-second N] [--tensorboard DIR] [--config FILE] [key=value ...]`"""
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        options = take_options(
            args, dict.fromkeys(["--gpus", "--gpu-memory", "--tokens-per-second", "--tensorboard"])
        )
        given = options["--tokens-per-second"]
        if given is not None and not (given.replace(".", "", 1).isdigit() and float(given) > 0):
            raise ConfigError(f"--tokens-per-second {given}: must be a number above 0")
        gpus, gpu_memory = read_gpus(options["--gpus"], options["--gpu-memory"])
        config = load_config(args)
        ds = build_ds_config(config)
        examples, account = load_examples(
            config, load_tokenizer(config.base, config.revision), "train"
        )
        lengths, targets = (
            np.array([len(e) for e in examples]),
            np.array([e.num_targets for e in examples]),
        )
        plan = plan_batches(
            lengths,
            config.tokens_per_step,
            config.seed,
            config.epochs,
            config.max_steps,
            visit_weights(examples),
        )
        shape = load_model_config(config.base, config.revision)
        memory, answer = describe_memory(
            config, ds, shape, gpus, gpu_memory, float(targets.sum() / lengths.sum())
        )
        counts, edges = np.histogram(lengths, bins=8, range=(0, config.max_seq_len))
        lr = learning_rates(config, len(plan))
        text = "\n".join(
            [
                f"examples    {account.kept:,} of {account.rows:,} to train on",
                *account.lines("train", config.max_seq_len),
                describe_plan(plan, lengths, targets, config, gpus, answer.rows),
                describe_time(plan.tokens, given, config),
                memory,
                "",
                "tokens of an example",
                *(
                    f"{int(a):6,}-{int(b):<6,} {'#' * int(50 * c / max(counts))} {c:,}"
                    for a, b, c in zip(edges, edges[1:], counts)
                ),
            ]
        )
        print(text, f"\nlearning rate over {len(plan):,} steps", plot(lr), sep="\n")
        if options["--tensorboard"]:
            with SummaryWriter(str(Path(options["--tensorboard"]))) as board:
                write_plan(board, text, lengths, lr)
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
