"""`./launch.sh bench`: tokens per second of the loop, and of its peers in the same call."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import notes
from shapes import LONGEST, MEAN, SHAPES, SUPERVISED, make_base

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from helpers import free_port  # noqa: E402

from loop.config.device import uses_gpu  # noqa: E402
from loop.config.schema import ConfigError  # noqa: E402
from loop.distributed.exit import exit_with_config_error  # noqa: E402

HERE = Path(__file__).resolve().parent
PEERS = ("plain", "trl", "trl-fast", "unsloth", "unsloth-packed")
ALONE = ("trl-fast", "unsloth", "unsloth-packed")  # no DeepSpeed: RANK would have them wrap a model
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def flops_per_token(shape: dict, mean: float = MEAN) -> float:
    """FLOPs that a QLoRA step must compute for each token of examples of that mean length.

    Each frozen weight takes 4: 2 forward and 2 for the gradient of the input. Causal attention is
    counted forward and backward, the output layer where a token is supervised.
    """
    hidden = shape["hidden_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * shape["intermediate_size"]
    pairs = 6 * heads * head_dim * mean
    layers = shape["num_hidden_layers"] * (4 * layer + pairs)
    return layers + 4 * SUPERVISED * shape["vocab_size"] * hidden


def matrix_rate() -> float:
    """FLOP/s of a large bf16 product here and now: what bounds a step from below."""
    from kernels_check.ceilings import check_matrix_rate

    row = next(iter(check_matrix_rate("cuda" if uses_gpu() else "cpu")))
    return row.speed * 1e12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.sh bench",
        description="Measure the loop, and peers beside it, on the seed's lengths.",
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="tinyllama" if uses_gpu() else "embedded"
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="ranks of the loop (on a CPU, too); peers run on one"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each contender runs, in turn"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        help=f"{', '.join(PEERS)}, with rows a micro-batch as in unsloth:8 (default 2)",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        help="the loop with these key=value, separated by blanks, beside the one given",
    )
    parser.add_argument(
        "--without-deepspeed", action="store_true", help="the loop around a bare model beside it"
    )
    parser.add_argument(
        "--gpu-memory", type=float, help="the loop has so many GiB of the GPU, as on a smaller card"
    )
    parser.add_argument(
        "--length",
        type=int,
        help="each example of the loop has so many tokens, instead of the seed's lengths",
    )
    parser.add_argument(
        "--profile", action="store_true", help="where one step's time goes on the GPU"
    )
    parser.add_argument(
        "--notes", action="store_true", help="how fast notes are written instead: see notes.py"
    )
    parser.add_argument(
        "--job", action="store_true", help="the whole seed job instead, and what each part takes"
    )
    parser.add_argument("--rows", type=int, help="training rows of --job")
    parser.add_argument("--json", help="write all figures there")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--base-dir", default=str(Path(tempfile.gettempdir()) / "soap-bench"))
    parser.add_argument("overrides", nargs="*", help="key=value for the loop")
    args = parser.parse_intermixed_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with one line and exit code 2 where arguments are wrong."""
    if args.steps < 8:
        parser.error(
            "--steps takes at least 8: two to warm up, and a window of four between two others"
        )
    for peer in args.peer:
        name, colon, micro = peer.partition(":")
        if name not in PEERS or colon and not (micro.isdecimal() and int(micro)):
            parser.error(f"--peer takes {', '.join(PEERS)}, and rows as in trl:8, not: {peer}")
    if args.without_deepspeed and args.gpus > 1:
        parser.error("--without-deepspeed has no ranks: leave out --gpus")


def make_contenders(args: argparse.Namespace) -> dict[str, dict]:
    """What each contender is told, by its name in the table. contenders.py reads it."""
    base = make_base(args.shape, Path(args.base_dir))
    common = {
        "shape": args.shape,
        "base": str(base),
        "steps": args.steps,
        "warm_up": min(8, args.steps // 4),
        "examples": args.steps * max(13, 1 + 16384 // (args.length or MEAN)),
        "length": args.length,
    }
    ours = common | {"name": "ours", "args": args.overrides, "gpu_memory": args.gpu_memory}
    contenders = {"the loop": ours}
    for variant in args.variant:
        contenders[f"the loop, {variant}"] = ours | {"args": [*args.overrides, *variant.split()]}
    if args.without_deepspeed:
        contenders["the loop without DeepSpeed"] = ours | {"without_deepspeed": True}
    for peer in args.peer:
        name, _, micro = peer.partition(":")
        contenders[peer] = common | {"name": name, "micro": int(micro or 2)}
    return contenders


def environments(name: str, world_size: int) -> list[dict[str, str]]:
    """The environment of each process of a contender."""
    inherited = {key: value for key, value in os.environ.items() if key not in DISTRIBUTED}
    if name in ALONE:
        return [inherited | {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}]
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        inherited | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(world_size)
    ]


def run(spec: dict, world_size: int, limit: float) -> dict:
    """Runs one contender: what it measured, or {"error": the end of its output}.

    limit: seconds that it may take.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec_path, out, log_path = (
            Path(folder) / name for name in ("spec.json", "out.json", "log")
        )
        spec_path.write_text(json.dumps(spec | {"out": str(out)}))
        command = [sys.executable, str(HERE / "contenders.py"), str(spec_path)]
        with log_path.open("w") as log:
            processes = [
                subprocess.Popen(command, stdout=log, stderr=log, env=env)
                for env in environments(spec["name"], world_size)
            ]
            try:
                codes = [process.wait(limit) for process in processes]
            except subprocess.TimeoutExpired:
                codes = [f"no end within {limit:.0f} s"]
            finally:
                for process in processes:
                    process.kill()
        if any(codes):
            lines = [line for line in log_path.read_text().splitlines() if line.strip()]
            return {"error": f"ended with {codes[0]}: {' | '.join(lines[-3:])[-500:]}"}
        return json.loads(out.read_text())


def run_all(contenders: dict[str, dict], args: argparse.Namespace) -> dict[str, list[dict]]:
    """What each contender measured in each round. They run in turn, so all see one machine."""
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    can_profile = args.profile and uses_gpu()
    for round_number in range(args.rounds):
        for name, spec in contenders.items():
            is_ours = spec["name"] == "ours"
            if can_profile and is_ours and round_number == 0:
                spec = spec | {"profile": True}
            result = run(spec, args.gpus if is_ours else 1, args.limit)
            results[name].append(result)
            print(f"{name}: {describe_run(result)}", flush=True)
    return results


def describe_run(result: dict) -> str:
    """One run in words, and its kernels where a step was profiled."""
    if "error" in result:
        return result["error"]
    speed = statistics.median(result["tokens_per_second"] or [0])
    first_step = result["first_step_after"]
    lines = [f"{speed:,.0f} tokens/s, first step after {first_step:.1f} s"]
    if result.get("micro_batch"):
        lines[0] += ", micro-batches of {} x {:,}".format(*result["micro_batch"])
    if result.get("card_gib"):
        lines[0] += f", {result['card_gib']:.2f} GiB of the GPU in use at the end"
    if "kernel_ms" in result:
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in result["kernel_ms"].items())
        lines.append(
            f"  {result['kernels']:,} kernels in {result['span_ms']:.0f} ms: {kinds}, "
            f"between them {result['between_kernels_ms']:.1f}"
        )
        lines += [f"    {ms:8.2f} ms  {name}" for name, ms in result["slowest"]]
    return "\n".join(lines)


def describe_contender(name: str, runs: list[dict], limit: float) -> str:
    """A line of the table: a contender over all its rounds. limit: tokens/s that products allow."""
    completed = [result for result in runs if "error" not in result]
    speeds = [speed for result in completed for speed in result["tokens_per_second"]]
    if not speeds:
        return f"{name:40} {runs[-1].get('error', 'no figures')}"
    median = statistics.median(speeds)
    peak = max((result["peak_gib"] or 0) for result in completed)
    first_step = statistics.median(result["first_step_after"] for result in completed)
    tokens = statistics.mean(result["tokens_per_step"] for result in completed)
    return (
        f"{name:40} {median:9,.0f} {min(speeds):8,.0f} {max(speeds):8,.0f} "
        f"{median / limit:9.1%} {tokens:8,.0f} {peak:8.1f} {first_step:8.1f} s"
    )


def main() -> None:
    if "--notes" in sys.argv:
        return notes.main()
    try:
        args = parse_args()
    except ConfigError as error:
        exit_with_config_error(error)
    if args.job:
        import job

        return job.main(args)
    results = run_all(make_contenders(args), args)
    rate = matrix_rate()
    limit = rate * args.gpus / flops_per_token(SHAPES[args.shape], args.length or MEAN)
    if args.length:
        lengths = f"examples of {args.length:,} tokens"
    else:
        lengths = f"mean of {MEAN} tokens, none above {LONGEST}"
    print(
        f"\n{args.shape}, {args.gpus} rank(s), {lengths}; "
        f"products at {rate / 1e12:,.2f} TFLOP/s allow {limit:,.0f} tokens/s"
    )
    print(
        f"{'contender':40} {'tokens/s':>9} {'lowest':>8} {'highest':>8} "
        f"{'of limit':>9} {'a step':>8} {'peak GiB':>8} {'first step':>10}"
    )
    for name, runs in results.items():
        print(describe_contender(name, runs, limit))
    if args.json:
        report = {"limit": limit, "matrix_rate": rate, "results": results}
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
