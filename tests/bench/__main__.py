"""`./launch.sh bench`: tokens per second of the loop, and of its peers beside it in the same call."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from shapes import LONGEST, MEAN, SHAPES, make_base

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from helpers import free_port  # noqa: E402

HERE = Path(__file__).resolve().parent


def flops_a_token(shape: dict, mean: float = MEAN) -> float:
    """What a QLoRA step must compute for a token of examples of that mean length: 4 for each frozen weight (2 forward, 2 for the gradient of the
    input), causal attention forward and backward, the output layer where a token is supervised."""
    head = shape["hidden_size"] // shape["num_attention_heads"]
    attention = (
        shape["hidden_size"]
        * head
        * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    )
    layer = attention + 3 * shape["hidden_size"] * shape["intermediate_size"]
    pairs = 6 * shape["num_attention_heads"] * head * mean
    return (
        shape["num_hidden_layers"] * (4 * layer + pairs)
        + 4 * 0.27 * shape["vocab_size"] * shape["hidden_size"]
    )


def matrix_rate() -> float:
    """FLOP/s of a large bf16 product here and now: the arithmetic floor of a step."""
    from kernels_check.ceilings import check_matrix_rate

    return (
        next(iter(check_matrix_rate("cuda" if torch.cuda.is_available() else "cpu"))).speed * 1e12
    )


def run(spec: dict, world_size: int, limit: float) -> dict:
    """One contender's figures, or {"error": its last line}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec | {"out": f"{folder}/out.json"}))
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        }
        ranks = [
            {
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "RANK": str(r),
                "LOCAL_RANK": str(r),
            }
            for r in range(world_size)
        ]
        if spec["name"] == "unsloth":  # would take them for a distributed run and wrap its model
            ranks = [{"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}]
        port = {} if spec["name"] == "unsloth" else {"MASTER_PORT": str(free_port())}
        log = open(f"{folder}/log", "w")
        processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "contenders.py"), str(path)],
                stdout=log,
                stderr=log,
                env=env | port | rank,
            )
            for rank in ranks
        ]
        try:
            codes = [p.wait(limit) for p in processes]
        except subprocess.TimeoutExpired:
            codes = [f"no end within {limit:.0f} s"]
        finally:
            for p in processes:
                p.kill()
        if any(codes):
            lines = [
                line for line in Path(f"{folder}/log").read_text().splitlines() if line.strip()
            ]
            return {"error": f"ended with {codes[0]}: {' | '.join(lines[-3:])[-500:]}"}
        return json.loads((Path(folder) / "out.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch.sh bench",
        description="Measure the loop, and peers beside it, on the seed's lengths.",
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="tinyllama" if torch.cuda.is_available() else "embedded"
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
        help="plain, trl or unsloth, with rows a micro-batch as in unsloth:8 (default 2)",
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
        "--length",
        type=int,
        help="each example of the loop has so many tokens, instead of the seed's lengths",
    )
    parser.add_argument(
        "--profile", action="store_true", help="where one step's time goes on the GPU"
    )
    parser.add_argument("--json", help="write all figures there")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--base-dir", default=str(Path(tempfile.gettempdir()) / "soap-bench"))
    parser.add_argument("overrides", nargs="*", help="key=value for the loop")
    args = parser.parse_intermixed_args()
    if args.steps < 8:
        parser.error(
            "--steps takes at least 8: two to warm up, and a window of four between two others"
        )
    if args.without_deepspeed and args.gpus > 1:
        parser.error("--without-deepspeed has no ranks: leave out --gpus")
    base, warm_up = make_base(args.shape, Path(args.base_dir)), min(8, args.steps // 4)
    common = {"shape": args.shape, "base": str(base), "steps": args.steps, "warm_up": warm_up}
    common |= {
        "examples": args.steps * max(13, 1 + 16384 // (args.length or MEAN)),
        "length": args.length,
    }
    contenders = {"the loop": common | {"name": "ours", "args": args.overrides}}
    for variant in args.variant:
        contenders[f"the loop, {variant}"] = common | {
            "name": "ours",
            "args": [*args.overrides, *variant.split()],
        }
    if args.without_deepspeed:
        contenders["the loop without DeepSpeed"] = common | {
            "name": "ours",
            "args": args.overrides,
            "without_deepspeed": True,
        }
    for peer in args.peer:
        name, _, micro = peer.partition(":")
        contenders[peer] = common | {"name": name, "micro": int(micro or 2)}
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name, spec in contenders.items():
            profile = (
                {"profile": True}
                if args.profile
                and spec["name"] == "ours"
                and number == 0
                and torch.cuda.is_available()
                else {}
            )
            results[name].append(
                run(spec | profile, args.gpus if spec["name"] == "ours" else 1, args.limit)
            )
            print(f"{name}: {describe(results[name][-1])}", flush=True)
    rate = matrix_rate()
    limit = rate * args.gpus / flops_a_token(SHAPES[args.shape], args.length or MEAN)
    lengths = (
        f"examples of {args.length:,} tokens"
        if args.length
        else f"mean of {MEAN} tokens, none above {LONGEST}"
    )
    print(
        f"\n{args.shape}, {args.gpus} rank(s), {lengths}; products at {rate / 1e12:,.2f} TFLOP/s allow {limit:,.0f} tokens/s"
    )
    print(
        f"{'contender':44} {'tokens/s':>10} {'lowest':>9} {'highest':>9} {'of the limit':>12} {'peak GiB':>9} {'first step':>10}"
    )
    for name, runs in results.items():
        good = [r for r in runs if "error" not in r]
        if speeds := [s for r in good for s in r["tokens_per_second"]]:
            middle, peak = statistics.median(speeds), max((r["peak_gib"] or 0) for r in good)
            first = statistics.median(r["first_step_after"] for r in good)
            print(
                f"{name:44} {middle:10,.0f} {min(speeds):9,.0f} {max(speeds):9,.0f} {middle / limit:12.1%} {peak:9.1f} {first:8.1f} s"
            )
        else:
            print(f"{name:44} {runs[-1].get('error', 'no figures')}")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"limit": limit, "matrix_rate": rate, "results": results}, indent=1)
        )


def describe(figures: dict) -> str:
    if "error" in figures:
        return figures["error"]
    lines = [
        f"{statistics.median(figures['tokens_per_second'] or [0]):,.0f} tokens/s, first step after {figures['first_step_after']:.1f} s"
    ]
    if "kernel_ms" in figures:
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in figures["kernel_ms"].items())
        lines.append(
            f"  {figures['kernels']:,} kernels in {figures['span_ms']:.0f} ms: {kinds}, between them {figures['between_kernels_ms']:.1f}"
        )
        lines += [f"    {ms:8.2f} ms  {name}" for name, ms in figures["slowest"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
