"""A run in words: its plan before the first step, and its result after the last.

`./launch.sh plan` shows the plan; each run prints it as well and writes it to TensorBoard.
"""

import shlex
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec, split_step


def describe_plan(
    plan: BatchPlan,
    lengths: np.ndarray,
    targets: np.ndarray,
    config: Config,
    world_size: int,
    micro_batch_size: int,
) -> str:
    """Three lines: what a step is, what the run is, how long the examples are.

    Args:
        lengths: int [n], tokens of each example.
        targets: int [n], supervised tokens of each example.
        micro_batch_size: rows of max_seq_len tokens that a micro-batch holds.
    """
    packing = PackingSpec(micro_batch_size * config.max_seq_len, config.max_seq_len)
    sample = range(min(len(plan), 50))
    micro_batches = np.mean(
        [len(split_step(plan[step], lengths, world_size, packing)[0]) for step in sample]
    )
    num_examples = len(plan.order)
    supervised = int(targets[plan.order].sum())
    return (
        f"a step      {config.batch_size} rows x {config.max_seq_len:,} = {plan.budget:,} tokens "
        f"of whole examples, on {world_size} rank(s) in {micro_batches:.1f} micro-batch(es) "
        f"on average of at most {micro_batch_size} x {config.max_seq_len:,} tokens\n"
        f"the run     {len(plan):,} steps, {num_examples:,} examples, "
        f"{num_examples / max(1, len(plan)):.1f} a step; {plan.tokens:,} tokens, "
        f"{supervised:,} of them supervised; the budget is filled to {plan.fill:.1%}\n"
        f"lengths     mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, "
        f"longest {lengths.max():,} tokens"
    )


def describe_duration(seconds: float) -> str:
    """`8 s`, `35 min` or `7.5 h`: in the unit in which a person waits for so long."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def write_plan(
    board: SummaryWriter, text: str, lengths: np.ndarray, lr: list[float], first_step: int = 0
) -> None:
    """Writes to TensorBoard what `./launch.sh plan` shows, and the learning rate of the whole run.

    Args:
        text: what `describe_plan` returned.
        lengths: int [n], tokens of each example.
        lr: the learning rate of each step.
        first_step: where a resumed run starts. Earlier steps are on the board already.
    """
    if not first_step:
        board.add_text("plan", markdown_block(text), 0)
        board.add_histogram("plan/tokens_of_an_example", lengths, 0)
    stride = -(-len(lr) // 1000)  # a thousand points show any curve
    for step in range(0, len(lr), stride):
        if step >= first_step:
            board.add_scalar("plan/lr", lr[step], step + 1)


def markdown_block(text: str) -> str:
    """`text` with four blanks before each line: Markdown shows such a block as it is."""
    return "    " + text.replace("\n", "\n    ")


def show_summary(config: Config, report: dict) -> None:
    """Prints the sample notes before and after the run, its losses, and what to do next."""
    folder = config.folder
    notes = sorted((folder / "samples").glob("step-*.md"))
    if len(notes) > 1:
        _show_file("a held-out conversation", folder / "samples" / "prompts.md")
        _show_file("before training", notes[0])
        _show_file("after", notes[-1])
    option = "--base" if config.method == "full" else "--adapter"
    validation = f", validation loss {report['eval/loss']:.4f}" if "eval/loss" in report else ""
    exported = report["exported"]
    print(
        f"\n{report['steps']} of {report['planned_steps']} steps: "
        f"training loss {report.get('train/loss_first', 0):.4f} -> "
        f"{report.get('train/loss_last', 0):.4f}{validation}, "
        f"{report.get('train/tokens_per_second', 0):,.0f} tokens/s\n"
        f"  written to        {exported}\n"
        f"  look at curves    ./launch.sh board {shlex.quote(config.run.dir)}\n"
        f"  write a note      ./launch.sh generate {option} {shlex.quote(exported)} "
        "--dialogue FILE\n"
        f"  score it          ./launch.sh evaluate --config {shlex.quote(f'{folder}/config.yaml')}"
    )


def _show_file(title: str, path: Path) -> None:
    print(f"\n--- {title} ({path}) ---\n{path.read_text()}")
