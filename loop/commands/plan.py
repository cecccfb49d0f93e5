"""`./launch.sh plan`: the whole run before its first step.

It shows what is left out, steps, tokens, fill, time, whether the run fits the GPUs' memory, the
lengths of the examples and the learning rate.
"""

import math
import re
import sys
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ..checkpoint.run_dir import read_report
from ..config.cli import load_config, printable, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import Config, ConfigError, check_path
from ..data.batch_plan import BatchPlan, plan_run
from ..data.dataset import load_examples, visit_weights
from ..distributed.exit import exit_with_config_error
from ..families.admission import admit_base, check_vocabulary
from ..memory.report import describe_memory, read_gpus
from ..monitor.quiet import quiet_libraries
from ..monitor.summary import describe_duration, describe_plan, write_plan
from ..optim.schedule import learning_rates

TIMING = "--timing"
OPTIONS = ("--gpus", "--gpu-memory", "--tokens-per-second", "--tensorboard")


def plot(values: list[float], height: int = 8, width: int = 72) -> str:
    """A curve in plain text, `height` lines of `width` characters; the top is the largest value."""
    width = min(width, len(values))
    columns = [values[i * (len(values) - 1) // max(1, width - 1)] for i in range(width)]
    top = max(columns) or 1.0
    lines = []
    for y in range(height):
        threshold = (height - y - 0.5) / height
        row = "".join("█" if value / top >= threshold else " " for value in columns)
        lines.append(f"{top * (height - y) / height:9.1e} |{row.rstrip()}")
    return "\n".join(lines)


def histogram(lengths: np.ndarray, max_seq_len: int) -> str:
    """The numbers of examples by length, a line for each of eight bins."""
    counts, edges = np.histogram(lengths, bins=8, range=(0, max_seq_len))
    lines = []
    for start, end, count in zip(edges, edges[1:], counts):
        bar = "#" * int(50 * count / max(counts))
        lines.append(f"{int(start):6,}-{int(end):<6,} {bar} {count:,}")
    return "\n".join(lines)


def read_rate(text: str | None) -> float | None:
    """The tokens per second that were typed. Raises ConfigError."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text) or not float(text):
        raise ConfigError(f"--tokens-per-second {printable(text)}: must be a number above 0")
    return float(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _values(part: Any) -> list[Any]:
    """The values of an object; [None] of anything else."""
    return list(part.values()) if isinstance(part, dict) else [None]


def describe_time(tokens: int, tokens_per_second: float | None, config: Config) -> str:
    """How long the steps take, in one line.

    Without `tokens_per_second` it is the speed of the last finished run of this name.
    """
    rate = tokens_per_second
    source = "as given"
    if rate is None:
        rate = read_report(config.folder).get("train/tokens_per_second")
        source = f"as measured in {config.folder}"
    if rate is None or not _is_number(rate) or rate <= 0:  # a report may be damaged
        return "time        not known before a first run; give --tokens-per-second N"
    return (
        f"time        {describe_duration(tokens / rate)} at {rate:,.0f} tokens/s ({source}), "
        "without evaluation and saving"
    )


def describe_parts(config: Config) -> str:
    """Where the seconds of the last run of this name went, a line for each part."""
    report = read_report(config.folder)
    start, whole = report.get("time_to_first_step") or {}, report.get("time")
    if not whole or not all(map(_is_number, [*_values(start), *_values(whole)])):
        return "parts       not known before a first run of this name"
    lines = [
        f"seconds, as measured in {config.folder}",
        f"{'':14}{'to first step':>14}{'in all':>9}",
    ]
    lines += [f"{name:14}{start.get(name, 0.0):14.1f}{spent:9.1f}" for name, spent in whole.items()]
    lines.append(f"{'sum':14}{sum(start.values()):14.1f}{sum(whole.values()):9.1f}")
    return "\n".join(lines)


def describe_run(
    config: Config, gpus: int, gpu_memory: int | None, tokens_per_second: float | None
) -> tuple[str, BatchPlan, np.ndarray]:
    """(all of the plan but the learning rate as text, the steps, tokens of each example: int [n]).

    Args:
        gpu_memory: bytes of one GPU; None: unknown.
        tokens_per_second: of the whole run; None: as the last run was.
    """
    ds_config = build_ds_config(config, for_gpus=True)
    tokenizer, model_config = admit_base(config)
    examples, report = load_examples(config, tokenizer, "train")
    check_vocabulary(config.base, model_config, {e.id: e.input_ids for e in examples})
    lengths = np.array([len(e) for e in examples])
    targets = np.array([e.num_targets for e in examples])
    plan = plan_run(config, lengths, visit_weights(examples))
    supervised_fraction = float(targets.sum() / lengths.sum())
    memory, memory_plan = describe_memory(
        config, ds_config, model_config, gpus, gpu_memory, supervised_fraction
    )
    lines = [
        f"examples    {report.kept:,} of {report.rows:,} to train on",
        *report.lines("train", config.max_seq_len),
        describe_plan(plan, lengths, targets, config, gpus, memory_plan.rows),
        describe_time(plan.tokens, tokens_per_second, config),
        memory,
        "",
        "tokens of an example",
        histogram(lengths, config.max_seq_len),
    ]
    return "\n".join(lines), plan, lengths


def write_board(folder: str, text: str, lengths: np.ndarray, lr: list[float]) -> None:
    """The plan for TensorBoard. Raises ConfigError where the folder can't be written."""
    check_path("--tensorboard", folder)
    try:
        with SummaryWriter(folder) as board:
            write_plan(board, text, lengths, lr)
    except OSError as error:
        raise ConfigError(f"--tensorboard {folder}: {error.strerror or error}") from error


def main(argv: list[str] | None = None) -> None:
    """`plan [--gpus N] [--gpu-memory GIB] [--tokens-per-second N] [--tensorboard DIR] [--timing]`

    And `[--config FILE] [key=value ...]`, as in a run.
    """
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        timing = TIMING in args
        args = [arg for arg in args if arg != TIMING]
        options = take_options(args, dict.fromkeys(OPTIONS))
        tokens_per_second = read_rate(options["--tokens-per-second"])
        gpus, gpu_memory = read_gpus(options["--gpus"], options["--gpu-memory"])
        config = load_config(args)
        text, plan, lengths = describe_run(config, gpus, gpu_memory, tokens_per_second)
        lr = learning_rates(config, len(plan))
        if timing:
            text += "\n\n" + describe_parts(config)
        print(text, f"\nlearning rate over {len(plan):,} steps", plot(lr), sep="\n")
        if options["--tensorboard"]:
            write_board(options["--tensorboard"], text, lengths, lr)
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
