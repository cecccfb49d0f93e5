"""The run in words: in advance, as `./launch.sh plan` shows it and each run says it before its first step, and what it came to."""

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ..config.schema import Config
from ..data.batch_plan import BatchPlan, split_step


def describe_plan(
    plan: BatchPlan,
    lengths: np.ndarray,
    targets: np.ndarray,
    config: Config,
    world_size: int,
    micro_batch_size: int,
) -> str:
    """The batch arithmetic, before the first step."""
    first = range(min(len(plan), 50))
    rounds = np.mean(
        [
            len(split_step(plan[s], lengths, world_size, micro_batch_size * config.max_seq_len)[0])
            for s in first
        ]
    )
    n = len(plan.order)
    return "\n".join(
        [
            f"a step      {config.batch_size} rows x {config.max_seq_len:,} = {plan.budget:,} tokens of whole examples, on {world_size} rank(s) "
            f"in {rounds:.1f} micro-batch(es) on average of at most {micro_batch_size} x {config.max_seq_len:,} tokens",
            f"the run     {len(plan):,} steps, {n:,} examples, {n / max(1, len(plan)):.1f} a step; {plan.tokens:,} tokens, "
            f"{int(targets[plan.order].sum()):,} of them supervised; the budget is filled to {plan.fill:.1%}",
            f"lengths     mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, longest {lengths.max():,} tokens",
        ]
    )


def write_plan(
    board: SummaryWriter, text: str, lengths: np.ndarray, lr: list[float], first_step: int = 0
) -> None:
    """What `./launch.sh plan` shows, in TensorBoard. After a resume only what it has dropped from `first_step` on."""
    if not first_step:
        board.add_text("plan", "    " + text.replace("\n", "\n    "), 0)
        board.add_histogram("plan/tokens_of_an_example", lengths, 0)
    for step in range(0, len(lr), -(-len(lr) // 1000)):  # a thousand points show any curve
        if step >= first_step:
            board.add_scalar("plan/lr", lr[step], step + 1)


def show_summary(config: Config, report: dict) -> None:
    """What the run came to, the sample notes before and after it, and where to look further."""
    samples = sorted((config.folder / "samples").glob("step-*.md"))
    if len(samples) > 1:
        titles = ["a held-out conversation", "before training", "after"]
        for title, path in zip(
            titles, [config.folder / "samples" / "prompts.md", samples[0], samples[-1]]
        ):
            print(f"\n--- {title} ({path}) ---\n{path.read_text()}")
    option = "--base" if config.method == "full" else "--adapter"
    evaluated = f", validation loss {report['eval/loss']:.4f}" if "eval/loss" in report else ""
    print(
        f"\n{report['steps']} of {report['planned_steps']} steps: training loss {report.get('train/loss_first', 0):.4f} -> "
        f"{report.get('train/loss_last', 0):.4f}{evaluated}, {report.get('train/tokens_per_second', 0):,.0f} tokens/s\n"
        f"  written to        {report['exported']}\n"
        f"  look at curves    ./launch.sh board {config.run.dir}\n"
        f"  write a note      ./launch.sh generate {option} {report['exported']} --dialogue FILE\n"
        f"  score it          ./launch.sh evaluate --config {config.folder}/config.yaml"
    )
