"""Does it fit? What the run chooses by the ledger, and what would make a run fit that does not."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .config import Config, ConfigError
from .distributed import Ranks, on_gpu
from .ledger import EVERY_WEIGHT, LOADED, STATES, WORKING, count_weights, ledger, most_rows
from .model import trainable

CONTEXT = 2**30  # what CUDA, its libraries and NCCL take beside the tensors: an allowance, not measured
MOST_GPUS = 64


def needed(parts: dict[str, int]) -> int:
    """Bytes of a ledger that are wanted beside the weights and the optimizer's state."""
    return sum(parts[name] for name in (*WORKING, "gradient bucket", "allocator slack"))


def choose_whole(
    config: Config, ds: dict, shape, world_size: int, free_bytes: int | None, fused: bool, supervised: float = 1 / 3
) -> tuple[dict, bool]:
    """(DeepSpeed's configuration, whether each rank keeps all weights). One rank does, unless they lie on the CPU or a disk. On several, ZeRO-3
    then partitions gradients, masters and moments, and its persistence thresholds are above all weights. `auto`: where that fits, and nothing has
    to be recomputed that need not be otherwise. free_bytes: as in `choose_micro_batch`; None: a CPU, no."""
    zero = ds["zero_optimization"]
    if zero.get("offload_param", {}).get("device", "none") != "none":
        return ds, False
    if world_size == 1:
        return ds, True
    whole = ds | {
        "zero_optimization": zero | dict.fromkeys(["stage3_param_persistence_threshold", "stage3_model_persistence_threshold"], EVERY_WEIGHT)
    }
    wanted = config.keep_whole
    if wanted == "auto" and free_bytes is not None:
        dense = fused and config.keep_dequantized is True
        free_bytes -= dense * ledger(shape, config, ds, world_size, 1, True, fused, True, supervised)["dequantised copies"]
        rest = fused, dense, supervised
        rows, checkpointing = choose_micro_batch(config, whole, shape, world_size, free_bytes, *rest, config.cuda_graphs)
        parts = ledger(shape, config, whole, world_size, rows, checkpointing, *rest, config.cuda_graphs and not checkpointing)
        otherwise = choose_micro_batch(config, ds, shape, world_size, free_bytes, *rest)[1]
        wanted = needed(parts) <= free_bytes and checkpointing <= otherwise
    return (whole, True) if wanted is True else (ds, False)


def choose_micro_batch(config: Config, ds: dict, shape, world_size: int, free_bytes: int | None, fused: bool, dequantized: bool,
                       supervised: float = 1 / 3, replayed: bool = False) -> tuple[int, bool]:  # fmt: skip
    """(micro_batch_size in rows, checkpointing). `auto` takes the fewest micro-batches that fit the free memory, and recomputes activations only
    where even one row does not fit without. free_bytes: beside the weights and the optimizer's state; None: a CPU, no checkpointing, all
    rows at once. replayed: whether layers that don't recompute are recorded. The others are as in `ledger`."""
    sizes = range(most_rows(config, world_size), 0, -1) if config.micro_batch_size == "auto" else [config.micro_batch_size]
    for checkpointing in [False, True] if config.gradient_checkpointing == "auto" else [config.gradient_checkpointing]:
        for size in sizes:
            if free_bytes is None:
                return size, checkpointing
            parts = ledger(shape, config, ds, world_size, size, checkpointing, fused, dequantized, supervised, replayed and not checkpointing)
            if needed(parts) <= free_bytes:
                return size, checkpointing
    return sizes[-1], config.gradient_checkpointing is not False


@dataclass(frozen=True)
class Answer:
    """What a run would choose on GPUs of this memory (in bytes, None: unknown), and its ledger."""

    rows: int
    checkpointing: bool
    dequantized: bool
    whole: bool  # on several GPUs, all weights on each
    parts: dict[str, int]
    memory: int | None

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + CONTEXT

    @property
    def fits(self) -> bool:
        return self.memory is None or self.total <= self.memory


def resolve(config: Config, ds: dict, shape, gpus: int, memory: int | None, supervised: float = 1 / 3) -> Answer:
    """Goes by the run's own rules for `auto`. memory: of one GPU, in bytes; unknown, all that makes a step fast is taken."""
    fused, free = bool(config.fused), None
    loaded = ledger(shape, config, ds, gpus, 1, True, fused, False, supervised)
    if memory is not None:
        free = memory - CONTEXT - sum(loaded[name] for name in (*LOADED, *STATES) if name != "gradient bucket")
    ds, whole = choose_whole(config, ds, shape, gpus, EVERY_WEIGHT if free is None else free, fused, supervised)
    dense = ledger(shape, config, ds, gpus, 1, True, fused, True, supervised)["dequantised copies"]
    replayed = config.cuda_graphs and whole
    wanted = config.keep_dequantized if config.keep_dequantized != "auto" else not replayed and (free is None or dense <= 0.1 * free)
    dequantized = bool(wanted and fused and dense)
    if free is not None:
        free -= dense * dequantized
    rows, checkpointing = choose_micro_batch(config, ds, shape, gpus, free, fused, dequantized, supervised, replayed)
    parts = ledger(shape, config, ds, gpus, rows, checkpointing, fused, dequantized, supervised, replayed and not checkpointing)
    return Answer(rows, checkpointing, dequantized, whole and gpus > 1, parts, memory)


def knobs(config: Config, ds: dict, shape, gpus: int, memory: int, supervised: float = 1 / 3) -> list[tuple[str, Answer]]:
    """What would make a run fit that does not: each way as it is typed, with the ledger that it leads to. Settings that only make the step slower
    stand first, together where none is enough by itself; then more GPUs, shorter rows and weights in the CPU's memory, with those settings
    where even all of them are not enough."""
    ds_cpu = ds | {"zero_optimization": ds["zero_optimization"] | {"offload_param": {"device": "cpu"}}}

    def ask(changes: dict, gpus=gpus, ds=ds) -> Answer:
        return resolve(config.model_copy(update=changes), ds, shape, gpus, memory, supervised)

    def first(ways) -> list[tuple[str, Answer]]:
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
        slower["keep_dequantized"] = False
    if now.whole:
        slower["keep_whole"] = False
    found = [way for name, value in slower.items() for way in first([("", {name: value}, {})])]
    if now.rows > 1:
        found += first([("", {"micro_batch_size": n}, {}) for n in range(min(now.rows, most_rows(config, gpus)) - 1, 0, -1)])
        slower["micro_batch_size"] = 1
    if not found and len(slower) > 1:
        found = first([("", slower, {})])
    tries = [{}] if found or not slower else [{}, slower]
    found += first([(f"--gpus {n}", changes, {"gpus": n}) for changes in tries for n in range(gpus + 1, MOST_GPUS + 1)])
    apart = max(8, config.max_seq_len // 16)
    shorter = range(config.max_seq_len - apart, 7, -apart)
    found += first([("", {"max_seq_len": n} | changes, {}) for changes in tries for n in shorter])
    return found + first([("offload_param in ds_config.json", changes, {"ds": ds_cpu}) for changes in tries])


def readable(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def describe_memory(config: Config, ds: dict, shape, gpus: int, memory: int | None, supervised: float) -> tuple[str, Answer]:
    """The table for one of the GPUs, the answer, and what would change a no."""
    answer, weights = resolve(config, ds, shape, gpus, memory, supervised), count_weights(shape, config)
    rows = {name: size for name, size in answer.parts.items() if size} | {"CUDA, its libraries, NCCL": CONTEXT, "total": answer.total}
    verdict = "" if memory is None else f" of {memory / 2**30:g} GiB: {'fits' if answer.fits else 'does not fit'}"
    lines = [
        f"memory      of each of {gpus} GPU(s), estimated: micro-batches of {answer.rows} x {config.max_seq_len:,} tokens, gradient checkpointing "
        f"{'on' if answer.checkpointing else 'off'}, layers {'fused' if config.fused else 'unfused'}, {sum(weights.trained):,} weights trained",
        *(f"            {name:<26}{readable(size):>12}" for name, size in rows.items()),
    ]
    lines[-1] += verdict
    if memory is not None and not answer.fits:
        ways = knobs(config, ds, shape, gpus, memory, supervised)
        for typed, way in ways:
            remark = " (longer examples: data.overlong)" if "max_seq_len" in typed else ""
            lines.append(f"            would fit: {typed}: {readable(way.total)}, micro-batches of {way.rows} row(s){remark}")
        if not ways:
            lines.append("            no setting makes it fit: take a smaller base, or GPUs with more memory")
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


def free_gpu_bytes(config: Config, model: torch.nn.Module, ranks: Ranks) -> int | None:
    """Memory for activations on the fullest GPU of the run, None on CPUs. What the engine will add is taken off: 18 bytes for every
    trainable weight (its fp32 master, gradient and two moments, and a gradient in bf16), shared by all ranks."""
    if ranks.device.type == "cpu":
        return None
    states = 18 * sum(getattr(p, "ds_numel", p.numel()) for _, p in trainable(model)) // ranks.world_size
    free = torch.tensor(torch.cuda.mem_get_info()[0] - states, device=ranks.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)  # all ranks must come to the same cut
    return int(free)
