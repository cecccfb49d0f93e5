"""`./launch.sh break NAME`: the embedded job right and with one planted mistake, their curves over each other."""

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
from shown import SHOWN

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RANKS = 2


def first_lines() -> dict[str, str]:
    """What each mistake is, from the docstrings of tests/proofs/mistakes.py, which is read and not imported: a list shall not wait for torch."""
    tree = ast.parse((HERE.parent / "proofs" / "mistakes.py").read_text())
    return {
        f.name: ast.get_docstring(f).split("\n\n")[0].replace("\n", " ")
        for f in tree.body
        if isinstance(f, ast.FunctionDef)
    }


def listing() -> str:
    width = max(map(len, SHOWN))
    return "\n".join(f"  {name:{width}}  {first_lines()[name]}" for name in SHOWN)


def train_both(spec: dict, folder: Path) -> None:
    """Runs tests/broken/ranks.py on two CPU ranks, which must all end well. Their output is seen; one that fails ends the command."""
    sys.path.insert(0, str(HERE.parent / "support"))
    from helpers import free_port  # late, as it takes a second

    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(
            map(str, (ROOT, HERE.parent / "support", HERE.parent / "proofs"))
        ),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // RANKS)))
    command = [sys.executable, str(HERE / "ranks.py"), str(folder / "spec.json")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(RANKS)
    ]
    try:
        while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
            for p in processes:
                try:
                    p.wait(0.5)
                except subprocess.TimeoutExpired:
                    pass
    except KeyboardInterrupt:
        sys.exit(130)
    finally:  # where one has failed, the other would wait for it for ever
        for p in processes:
            p.kill() if p.poll() is None else None
    if code := next((p.returncode for p in processes if p.returncode > 0), processes[0].returncode):
        sys.exit(code if code > 0 else 1)


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[tag]) for line in lines if tag in line]


def main() -> None:
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
        return print(f"usage: ./launch.sh break NAME [--steps N] [key=value ...]\n{listing()}")
    if args.name not in SHOWN:
        print(
            f"error: break {args.name}: there is no such mistake; there are:\n{listing()}",
            file=sys.stderr,
        )
        sys.exit(2)
    if args.steps < 4:
        parser.error(f"--steps {args.steps}: at least 4")
    shown, folder = SHOWN[args.name], Path(args.dir).resolve() / args.name
    for old in ("right", "wrong"):
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    middle = args.steps // 2
    train_both(
        {
            "name": args.name,
            "out": str(folder / "gradient.json"),
            "eos": "eval/eos_loss" in shown.shows,
            "short_notes": shown.short_notes,
            "spike": [max(2, args.steps // 4), shown.spike] if shown.spike else None,
            "resume": middle if shown.resume else None,
            "at": middle + 1 if shown.resume else 1,
            "args": [
                "--config",
                "loop/configs/embedded.yaml",
                *COMMON,
                *shown.args,
                f"max_steps={args.steps}",
                f"run.dir={folder}",
                f"monitor.eval_steps={max(2, args.steps // 4)}",
                *args.overrides,
            ],
        },
        folder,
    )

    tags = ["train/loss", "train/grad_norm", *shown.shows]
    curves = {tag: (curve(folder / "right", tag), curve(folder / "wrong", tag)) for tag in tags}
    picture = folder / f"{args.name}.png"
    draw(picture, args.name, first_lines()[args.name], shown.paragraph, curves)
    print(
        f"\n{args.name}: {first_lines()[args.name]}\n\n{textwrap.fill(shown.paragraph, 120)}\n\n{'last value of':22} {'right':>10} {'wrong':>10}"
    )
    for tag, (right, wrong) in curves.items():
        print(f"{tag:22} {right[-1][1]:10.4g} {wrong[-1][1]:10.4g}")
    found = json.loads((folder / "gradient.json").read_text())
    print(
        f"gradient of step {found['step']}, before clipping: {found['gradient_distance']:.2%} away from the right one\n\n"
        f"  the picture       {picture}\n"
        f"  in TensorBoard    tensorboard --logdir {folder}"
    )


# 4 examples a step, a row of two on each rank. Little is evaluated, nothing is sampled or audited, and no tokens are kept: a planted mistake must
# neither find a right run's nor leave its own.
COMMON = [
    "batch_size=1",
    "max_seq_len=2048",
    "data.limit=300",
    "data.cache=false",
    "run.export_check_examples=0",
    "run.save_steps=1000",
    "monitor.sample_notes=[]",
]

if __name__ == "__main__":
    main()
