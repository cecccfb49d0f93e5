"""`./launch.sh plan`: the whole run before its first step: what is left out, steps, tokens, fill, lengths, learning rate, time, memory."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM

from .cli import exit_with_config_error, load_config, take_options
from .config import Config, ConfigError
from .data import load_examples, weights_of
from .describe import describe_plan, learning_rates, write_plan
from .model import activation_bytes, load_shape, load_tokenizer
from .monitor import quiet_libraries
from .packing import make_plan


def plot(values: list[float], height: int = 8, width: int = 72) -> str:
    """A curve in plain text, top = the largest value."""
    width = min(width, len(values))
    columns = [values[i * (len(values) - 1) // max(1, width - 1)] for i in range(width)]
    top = max(columns) or 1.0
    rows = ["".join("█" if v / top >= (height - y - 0.5) / height else " " for v in columns).rstrip() for y in range(height)]
    return "\n".join(f"{top * (height - y) / height:9.1e} |{row}" for y, row in enumerate(rows))


def describe_time(tokens: int, given: str | None, config: Config) -> str:
    """How long the steps take at a given number of tokens/s, or at the last finished run's of this name."""
    report = config.folder / "report.json"
    rate, source = (float(given), "as given") if given else (None, "")
    if rate is None and report.is_file():
        rate, source = json.loads(report.read_text()).get("train/tokens_per_second"), f"as measured in {config.folder}"
    if not rate:
        return "time        not known before a first run; give --tokens-per-second N"
    return f"time        {tokens / rate / 60:,.0f} min at {rate:,.0f} tokens/s ({source}), without evaluation and saving"


def count_parameters(shape, config: Config) -> tuple[int, int, int]:
    """(weights of linear layers that NF4 stores, all other weights, weights of the LoRA adapter) of the base, without loading it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    linear = {m.weight: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    matrices = sum(w.numel() for w in linear)
    other = sum(p.numel() for p in model.parameters()) - matrices
    if config.method == "full":
        return matrices, other, 0
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora))
    return matrices, other, sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)


def describe_memory(config: Config, rows: int) -> str:
    """An estimate of what one GPU alone would hold."""
    shape = load_shape(config.base, config.revision)
    matrices, other, adapter = count_parameters(shape, config)
    frozen = 0 if config.method == "full" else (matrices * (4.127 / 8 if config.method == "qlora" else 2) + other * 2)
    trained = (matrices + other if config.method == "full" else adapter) * (2 + 16)  # bf16, and fp32 master, gradient and two moments
    tokens = rows * config.max_seq_len
    parts = {"frozen base": frozen, f"{trained // 18:,} trained weights with master, gradient, moments": trained,
             f"activations of {tokens:,} tokens": activation_bytes(shape, tokens, False),
             "or, with gradient checkpointing": activation_bytes(shape, tokens, True)}  # fmt: skip
    return "memory      one GPU, estimated: " + "; ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())


def main(argv: list[str] | None = None) -> None:
    """`plan [--tokens-per-second N] [--tensorboard DIR] [--config FILE] [key=value ...]`"""
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        options = take_options(args, {"--tokens-per-second": None, "--tensorboard": None})
        given = options["--tokens-per-second"]
        if given is not None and not (given.replace(".", "", 1).isdigit() and float(given) > 0):
            raise ConfigError(f"--tokens-per-second {given}: must be a number above 0")
        config = load_config(args)
        examples, account = load_examples(config, load_tokenizer(config.base, config.revision), "train")
        lengths, targets = np.array([len(e) for e in examples]), np.array([e.num_targets for e in examples])
        plan = make_plan(lengths, config.tokens_per_step, config.seed, config.epochs, config.max_steps, weights_of(examples))
        rows = config.batch_size if config.micro_batch_size == "auto" else config.micro_batch_size
        counts, edges = np.histogram(lengths, bins=8, range=(0, config.max_seq_len))
        lr = learning_rates(config, len(plan))
        text = "\n".join([
            f"examples    {account.kept:,} of {account.rows:,} to train on", *account.lines("train", config.max_seq_len),
            describe_plan(plan, lengths, targets, config, 1, rows), describe_time(plan.tokens, given, config), describe_memory(config, rows),
            "", "tokens of an example",
            *(f"{int(a):6,}-{int(b):<6,} {'#' * int(50 * c / max(counts))} {c:,}" for a, b, c in zip(edges, edges[1:], counts)),
        ])  # fmt: skip
        print(text, f"\nlearning rate over {len(plan):,} steps", plot(lr), sep="\n")
        if options["--tensorboard"]:
            with SummaryWriter(str(Path(options["--tensorboard"]))) as board:
                write_plan(board, text, lengths, lr)
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
