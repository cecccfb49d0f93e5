"""The memory estimate as `./launch.sh plan` prints it, and the settings with which a run fits."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config.schema import Config, ConfigError
from ..distributed.world import on_gpu
from .estimate import count_weights, max_rows
from .planner import CONTEXT, MemoryPlan, plan_memory

MAX_GPUS = 64


@dataclass(frozen=True)
class Proposal:
    """A change that may make a run fit."""

    settings: dict[str, Any] = field(default_factory=dict)  # of the configuration
    gpus: int | None = None  # None: as many as now
    offload: bool = False  # weights in the CPU's memory

    @property
    def typed(self) -> str:
        """The change as a person types it."""
        words = []
        if self.gpus is not None:
            words.append(f"--gpus {self.gpus}")
        if self.offload:
            words.append("offload_param in ds_config.json")
        words += [f"{key}={str(value).lower()}" for key, value in self.settings.items()]
        return " ".join(words)


def settings_that_fit(
    config: Config,
    ds_config: dict,
    model_config,
    gpus: int,
    memory: int,
    supervised_fraction: float = 1 / 3,
) -> list[tuple[str, MemoryPlan]]:
    """The changes that make a run fit that does not: [(as it is typed, the plan with it)].

    Settings that only make the step slower come first: each that is enough by itself, or all of
    them together where none is. Then come more GPUs, shorter rows and weights in the CPU's memory,
    together with those settings where even all of them are not enough. Arguments as in
    `plan_memory`.
    """
    zero_on_cpu = ds_config["zero_optimization"] | {"offload_param": {"device": "cpu"}}
    offloading = ds_config | {"zero_optimization": zero_on_cpu}

    def plan(proposal: Proposal) -> MemoryPlan:
        return plan_memory(
            config.model_copy(update=proposal.settings),
            offloading if proposal.offload else ds_config,
            model_config,
            proposal.gpus or gpus,
            memory,
            supervised_fraction,
        )

    def first_that_fits(proposals: Iterable[Proposal]) -> list[tuple[str, MemoryPlan]]:
        """One element, or none."""
        for proposal in proposals:
            result = plan(proposal)
            if result.fits:
                return [(proposal.typed, result)]
        return []

    current = plan(Proposal())
    slower = slower_settings(current) | embedding_and_loss_settings(config, model_config, gpus)
    found = []
    for name, value in slower.items():
        found += first_that_fits([Proposal({name: value})])
    if current.rows > 1:
        most = min(current.rows, max_rows(config, gpus)) - 1
        found += first_that_fits(Proposal({"micro_batch_size": n}) for n in range(most, 0, -1))
        slower["micro_batch_size"] = 1
    if not found and len(slower) > 1:
        found = first_that_fits([Proposal(slower)])

    bases: list[dict[str, Any]] = [{}]
    if slower and not found:
        bases.append(slower)
    gpu_numbers = range(gpus + 1, MAX_GPUS + 1)
    found += first_that_fits(Proposal(base, gpus=n) for base in bases for n in gpu_numbers)
    interval = max(8, config.max_seq_len // 16)
    lengths = range(config.max_seq_len - interval, 7, -interval)
    found += first_that_fits(Proposal({"max_seq_len": n} | base) for base in bases for n in lengths)
    return found + first_that_fits(Proposal(base, offload=True) for base in bases)


def embedding_and_loss_settings(config: Config, model_config, gpus: int) -> dict[str, Any]:
    """Settings that need less memory for the embedding and for the loss."""
    smaller: dict[str, Any] = {}
    untied = count_weights(config, model_config).embedding
    if gpus == 1 and untied and config.method != "full" and not config.embedding_on_cpu:
        smaller["embedding_on_cpu"] = True
    if not config.chunked_loss:
        smaller["chunked_loss"] = True
    return smaller


def slower_settings(plan: MemoryPlan) -> dict[str, Any]:
    """Settings that cost a run time and need less memory than what the plan has chosen."""
    slower: dict[str, Any] = {}
    if not plan.checkpointing:
        slower["gradient_checkpointing"] = True
    if plan.dequantized:
        slower["cache_dequantized_weights"] = False
    if plan.replicated:
        slower["replicate_weights"] = False
    return slower


def format_bytes(size: float) -> str:
    """In GiB, or in MiB below one GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def describe_memory(
    config: Config,
    ds_config: dict,
    model_config,
    gpus: int,
    memory: int | None,
    supervised_fraction: float,
) -> tuple[str, MemoryPlan]:
    """(the table for one of the GPUs with what would make the run fit, the plan it shows).

    Arguments as in `plan_memory`.
    """
    plan = plan_memory(config, ds_config, model_config, gpus, memory, supervised_fraction)
    sizes = {name: size for name, size in plan.parts.items() if size}
    sizes |= {"CUDA, its libraries, NCCL": CONTEXT, "total": plan.total}
    lines = [
        f"memory      of each of {gpus} GPU(s), estimated: micro-batches of {plan.rows} x "
        f"{config.max_seq_len:,} tokens, gradient checkpointing "
        f"{'on' if plan.checkpointing else 'off'}, layers "
        f"{'fused' if config.fused_layers else 'unfused'}, "
        f"{sum(count_weights(config, model_config).trained):,} weights trained"
    ]
    lines += [f"            {name:<26}{format_bytes(size):>12}" for name, size in sizes.items()]
    if memory is not None:
        result = "fits" if plan.fits else "does not fit"
        lines[-1] += f" of {memory / 2**30:g} GiB: {result}"
        if not plan.fits:
            lines += describe_proposals(
                settings_that_fit(
                    config, ds_config, model_config, gpus, memory, supervised_fraction
                )
            )
    return "\n".join(lines), plan


def describe_proposals(proposals: list[tuple[str, MemoryPlan]]) -> list[str]:
    """A line for each result of `settings_that_fit`."""
    if not proposals:
        return [
            "            no setting makes it fit: take a smaller base, or GPUs with more memory"
        ]
    lines = []
    for typed, plan in proposals:
        note = " (longer examples: data.overlong)" if "max_seq_len" in typed else ""
        lines.append(
            f"            would fit: {typed}: {format_bytes(plan.total)}, micro-batches of "
            f"{plan.rows} row(s){note}"
        )
    return lines


def read_gpus(gpus: str | None, memory: str | None) -> tuple[int, int | None]:
    """(number of GPUs, bytes of one), from what was typed on the command line.

    Left out, it is one GPU with the memory of this machine's, or None without a GPU.

    Args:
        memory: in GiB.

    Raises ConfigError naming the option.
    """
    if gpus is not None and not (gpus.isdecimal() and int(gpus) > 0):
        raise ConfigError(f"--gpus {gpus}: must be a whole number above 0")
    count = int(gpus or 1)
    if memory is None:
        return count, torch.cuda.mem_get_info()[1] if on_gpu() else None
    if not (memory.replace(".", "", 1).isdecimal() and float(memory) > 0):
        raise ConfigError(f"--gpu-memory {memory}: must be a number of GiB above 0")
    return count, int(float(memory) * 2**30)
