"""Does it fit? What the run chooses by the ledger, and what would make a run fit that does not."""

import torch

from ..config.schema import Config, ConfigError
from ..distributed.world import on_gpu
from .estimate import count_weights, max_rows
from .planner import CONTEXT, MemoryPlan, plan_memory

MOST_GPUS = 64


def settings_that_fit(
    config: Config, ds: dict, shape, gpus: int, memory: int, supervised: float = 1 / 3
) -> list[tuple[str, MemoryPlan]]:
    """What would make a run fit that does not: each way as it is typed, with the ledger that it leads to. Settings that only make the step slower
    stand first, together where none is enough by itself; then more GPUs, shorter rows and weights in the CPU's memory, with those settings
    where even all of them are not enough."""
    ds_cpu = ds | {
        "zero_optimization": ds["zero_optimization"] | {"offload_param": {"device": "cpu"}}
    }

    def ask(changes: dict, gpus=gpus, ds=ds) -> MemoryPlan:
        return plan_memory(config.model_copy(update=changes), ds, shape, gpus, memory, supervised)

    def first(ways) -> list[tuple[str, MemoryPlan]]:
        """The first of (how it is typed, settings, more arguments) that fits."""
        for typed, changes, more in ways:
            answer = ask(changes, **more)
            if answer.fits:
                settings = " ".join(f"{k}={str(v).lower()}" for k, v in changes.items())
                return [(" ".join(filter(None, [typed, settings])), answer)]
        return []

    slower: dict[str, int] = {}
    now = ask({})
    if not now.checkpointing:
        slower["gradient_checkpointing"] = True
    if now.dequantized:
        slower["cache_dequantized_weights"] = False
    if now.whole:
        slower["replicate_weights"] = False
    found = [way for name, value in slower.items() for way in first([("", {name: value}, {})])]
    if now.rows > 1:
        found += first(
            [
                ("", {"micro_batch_size": n}, {})
                for n in range(min(now.rows, max_rows(config, gpus)) - 1, 0, -1)
            ]
        )
        slower["micro_batch_size"] = 1
    if not found and len(slower) > 1:
        found = first([("", slower, {})])
    tries = [{}] if found or not slower else [{}, slower]
    found += first(
        [
            (f"--gpus {n}", changes, {"gpus": n})
            for changes in tries
            for n in range(gpus + 1, MOST_GPUS + 1)
        ]
    )
    apart = max(8, config.max_seq_len // 16)
    shorter = range(config.max_seq_len - apart, 7, -apart)
    found += first([("", {"max_seq_len": n} | changes, {}) for changes in tries for n in shorter])
    return found + first(
        [("offload_param in ds_config.json", changes, {"ds": ds_cpu}) for changes in tries]
    )


def format_bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def describe_memory(
    config: Config, ds: dict, shape, gpus: int, memory: int | None, supervised: float
) -> tuple[str, MemoryPlan]:
    """The table for one of the GPUs, the answer, and what would change a no."""
    answer, weights = (
        plan_memory(config, ds, shape, gpus, memory, supervised),
        count_weights(shape, config),
    )
    rows = {name: size for name, size in answer.parts.items() if size} | {
        "CUDA, its libraries, NCCL": CONTEXT,
        "total": answer.total,
    }
    verdict = (
        ""
        if memory is None
        else f" of {memory / 2**30:g} GiB: {'fits' if answer.fits else 'does not fit'}"
    )
    lines = [
        f"memory      of each of {gpus} GPU(s), estimated: micro-batches of {answer.rows} x {config.max_seq_len:,} tokens, gradient checkpointing "
        f"{'on' if answer.checkpointing else 'off'}, layers {'fused' if config.fused_layers else 'unfused'}, {sum(weights.trained):,} weights trained",
        *(f"            {name:<26}{format_bytes(size):>12}" for name, size in rows.items()),
    ]
    lines[-1] += verdict
    if memory is not None and not answer.fits:
        ways = settings_that_fit(config, ds, shape, gpus, memory, supervised)
        for typed, way in ways:
            remark = " (longer examples: data.overlong)" if "max_seq_len" in typed else ""
            lines.append(
                f"            would fit: {typed}: {format_bytes(way.total)}, micro-batches of {way.rows} row(s){remark}"
            )
        if not ways:
            lines.append(
                "            no setting makes it fit: take a smaller base, or GPUs with more memory"
            )
    return "\n".join(lines), answer


def read_gpus(gpus: str | None, memory: str | None) -> tuple[int, int | None]:
    """(GPUs, bytes of one) as typed in GiB, else 1, and the memory of this machine's GPU if there is one. Raises ConfigError."""
    if gpus is not None and not (gpus.isdecimal() and int(gpus) > 0):
        raise ConfigError(f"--gpus {gpus}: must be a whole number above 0")
    if memory is None:
        return int(gpus or 1), torch.cuda.mem_get_info()[1] if on_gpu() else None
    if not (memory.replace(".", "", 1).isdecimal() and float(memory) > 0):
        raise ConfigError(f"--gpu-memory {memory}: must be a number of GiB above 0")
    return int(gpus or 1), int(float(memory) * 2**30)
