"""`./launch.sh break NAME`: the embedded job with and without a planted mistake, in one picture."""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from chart import draw
from shown import SHOWN, Shown

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RANKS = 2
# 4 examples a step, a row of two on each rank. Little is evaluated, nothing is sampled or audited.
# Tokens are not cached: a planted mistake must neither find a right run's nor leave its own.
COMMON = [
    "batch_size=1",
    "max_seq_len=2048",
    "data.limit=300",
    "data.cache=false",
    "run.export_check_examples=0",
    "run.save_steps=1000",
    "monitor.sample_notes=[]",
]

Curve = list[tuple[int, float]]  # (step, value)


def describe_mistakes() -> dict[str, str]:
    """What each mistake is: the first lines of the docstrings of tests/proofs/mistakes.py.

    The file is parsed and not imported, because a list must not wait for torch.
    """
    tree = ast.parse((HERE.parent / "proofs" / "mistakes.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: ast.get_docstring(f).split("\n\n")[0].replace("\n", " ") for f in functions}


def list_mistakes() -> str:
    """The mistakes that can be shown, a line each."""
    width = max(map(len, SHOWN))
    descriptions = describe_mistakes()
    return "\n".join(f"  {name:{width}}  {descriptions[name]}" for name in SHOWN)


def parse_args() -> argparse.Namespace:
    """Exits with 0 after the list of mistakes, and with 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="launch.sh break",
        description="Show what a planted mistake does to the curves of the embedded job.",
    )
    parser.add_argument(
        "name", nargs="?", help="a mistake of tests/proofs/mistakes.py; without one they are listed"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--dir", default="runs/break", help="where NAME/right, NAME/wrong and NAME/NAME.png go"
    )
    parser.add_argument("overrides", nargs="*", help="key=value for both runs")
    args = parser.parse_intermixed_args()
    if args.name is None:
        print(f"usage: ./launch.sh break NAME [--steps N] [key=value ...]\n{list_mistakes()}")
        sys.exit(0)
    if args.name not in SHOWN:
        problem = f"error: break {args.name}: there is no such mistake; there are:"
        print(f"{problem}\n{list_mistakes()}", file=sys.stderr)
        sys.exit(2)
    if args.steps < 4:
        parser.error(f"--steps {args.steps}: at least 4")
    return args


def make_spec(args: argparse.Namespace, shown: Shown, folder: Path) -> dict:
    """What ranks.py is told."""
    quarter = max(2, args.steps // 4)
    middle = args.steps // 2
    return {
        "name": args.name,
        "out": str(folder / "gradient.json"),
        "eos": "eval/eos_loss" in shown.curves,
        "short_notes": shown.short_notes,
        "spike": [quarter, shown.spike] if shown.spike else None,
        "resume": middle if shown.resume else None,
        "at": middle + 1 if shown.resume else 1,
        "args": [
            "--config",
            "loop/configs/embedded.yaml",
            *COMMON,
            *shown.args,
            f"max_steps={args.steps}",
            f"run.dir={folder}",
            f"monitor.eval_steps={quarter}",
            *args.overrides,
        ],
    }


def train_both(spec: dict, folder: Path) -> None:
    """Runs ranks.py on two CPU ranks, with their output on the terminal.

    Exits with the code of a rank that fails.
    """
    sys.path.insert(0, str(HERE.parent / "support"))
    from helpers import free_port  # late, as it takes a second

    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE.parent / "proofs"))),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // RANKS)))
    command = [sys.executable, str(HERE / "ranks.py"), str(folder / "spec.json")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(RANKS)
    ]
    try:
        wait_for_ranks(processes)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        failures = [code for code in codes if code > 0]  # a killed rank has a negative code
        sys.exit(failures[0] if failures else 1)


def wait_for_ranks(processes: list[subprocess.Popen]) -> None:
    """Returns when all have ended or one has failed: the others would wait for it for ever."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            return
        for process in processes:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                pass


def read_curve(folder: Path, tag: str) -> Curve:
    """The scalars of one tag of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[tag]) for line in lines if tag in line]


def show_result(name: str, shown: Shown, folder: Path) -> None:
    """Draws the curves of both runs and prints the explanation and their last values."""
    description = describe_mistakes()[name]
    tags = ["train/loss", "train/grad_norm", *shown.curves]
    curves = {
        tag: (read_curve(folder / "right", tag), read_curve(folder / "wrong", tag)) for tag in tags
    }
    picture = folder / f"{name}.png"
    draw(picture, name, description, shown.paragraph, curves)
    print(f"\n{name}: {description}\n\n{textwrap.fill(shown.paragraph, 120)}\n")
    print(f"{'last value of':22} {'right':>10} {'wrong':>10}")
    for tag, (right, wrong) in curves.items():
        print(f"{tag:22} {right[-1][1]:10.4g} {wrong[-1][1]:10.4g}")
    gradient = json.loads((folder / "gradient.json").read_text())
    print(
        f"gradient of step {gradient['step']}, before clipping: "
        f"{gradient['gradient_distance']:.2%} away from the right one\n\n"
        f"  the picture       {picture}\n"
        f"  in TensorBoard    tensorboard --logdir {folder}"
    )


def main() -> None:
    args = parse_args()
    shown = SHOWN[args.name]
    folder = Path(args.dir).resolve() / args.name
    for name in ("right", "wrong"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    train_both(make_spec(args, shown, folder), folder)
    show_result(args.name, shown, folder)


if __name__ == "__main__":
    main()
