"""`./launch.sh train --verify-resume`: proves that a resumed run equals the uninterrupted one.

It does so on this machine, with this configuration. It makes four steps in one go, and the same
four in two launches, the first of which a time limit ends after a step. Then it compares everything
that training makes, to the bit. Where a GPU's kernels add in no fixed order, even two uninterrupted
runs differ. Then a third run shows by how much, and the resumed run may differ by as much.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..config.cli import load_config, take_options
from ..config.deepspeed import build_ds_config
from ..config.schema import ROOT, Config, ConfigError
from ..distributed.exit import exit_with_config_error

STEPS = 4
CURVES = ("train/loss", "train/grad_norm", "train/lr")
# What must be equal even where kernels add in no fixed order.
EXACT = ("order of the examples", "train/lr", "generators of every rank")
INFINITY = float("inf")


def launch(folder: Path, name: str, options: list[str], *more: str) -> None:
    """Runs `./launch.sh train` in `folder`. Shows its output when it fails, and exits as it did."""
    command = [
        str(ROOT / "launch.sh"),
        "train",
        *options,
        f"run.dir={folder}",
        f"run.name={name}",
        *more,
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.stderr.write(process.stdout[-2000:] + process.stderr)
        sys.exit(process.returncode)


def read_results(folder: Path) -> dict:
    """What a run has made: its curves, generators, counters, and its state as hashes and tensors.

    Keys are named for messages. "curves" is {tag: [(step, value), ...]}, "exported weights" is
    {name: tensor}; the others are compared as they are.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "checkpoints" / "newest" / "manifest.json").read_text())
    (exported,) = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(exported.glob("*.safetensors")):
        weights |= load_file(path)
    return {
        "curves": {
            tag: [(line["step"], line[tag]) for line in lines if tag in line] for tag in CURVES
        },
        "order of the examples": manifest["identity"]["plan"],
        "generators of every rank": manifest["rng"],
        "masters and Adam moments": [manifest["optimizer_step"], manifest["files"]],
        "exported weights": weights,
    }


def find_differences(ours: dict, theirs: dict) -> list[str]:
    """The names of what two runs don't have in common to the bit. Both are of `read_results`."""
    different = [tag for tag in CURVES if ours["curves"][tag] != theirs["curves"][tag]]
    for key in ours:
        if key == "exported weights":
            same = equal_tensors(ours[key], theirs[key])
        else:
            same = key == "curves" or ours[key] == theirs[key]
        if not same:
            different.append(key)
    return different


def equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and values."""
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def largest_difference(ours: dict, theirs: dict) -> float:
    """The largest relative difference of the losses and gradient norms of two runs.

    It is infinite when they made other steps.
    """
    largest = 0.0
    for tag in ("train/loss", "train/grad_norm"):
        ours_curve = ours["curves"][tag]
        theirs_curve = theirs["curves"][tag]
        if min(len(ours_curve), len(theirs_curve)) < STEPS:
            return INFINITY
        for (step, value), (their_step, their_value) in zip(ours_curve, theirs_curve):
            if step != their_step:
                return INFINITY
            difference = abs(value - their_value) / max(abs(their_value), 1e-12)
            largest = max(largest, difference)
    return largest


def judge(uninterrupted: dict, resumed: dict, repeated: dict | None = None) -> tuple[bool, str]:
    """(whether the resumed run is right, what to say of it). All are of `read_results`.

    repeated: a second uninterrupted run, needed where the first two differ.
    """
    different = find_differences(resumed, uninterrupted)
    if not different:
        return True, "the resumed run equals the uninterrupted one to the bit"
    if repeated is None or not find_differences(repeated, uninterrupted):
        return False, (
            f"NOT the same: {', '.join(different)}; two uninterrupted runs are the same, so it is "
            "the resume that changes them"
        )
    of_resuming = largest_difference(resumed, uninterrupted)
    of_repeating = largest_difference(repeated, uninterrupted)
    exact = not any(name in different for name in EXACT)
    return exact and of_resuming <= 3 * of_repeating, (
        f"losses and norms of the resumed run differ by up to {of_resuming:.1e} from the "
        f"uninterrupted one, those of two uninterrupted runs by {of_repeating:.1e}: kernels of "
        "this machine add in no fixed order"
    )


def verify(config: Config, options: list[str], folder: Path) -> tuple[bool, str]:
    """Makes the runs and compares them; returns what `judge` returns.

    options: the user's arguments for launch.sh; folder: an empty one, for the runs.
    """
    short = [
        f"max_steps={STEPS}",
        f"warmup_steps={min(config.warmup_steps, STEPS - 1)}",
        "data.valid=null",
        "data.valid_fraction=0",
        "monitor.sample_notes=[]",
        "monitor.best=loss",
        "run.export=last",
        "run.patience=null",
        "run.resume=true",
        "run.max_hours=null",
        "run.export_check_examples=0",
        f"run.deterministic={'run.deterministic=false' not in options}",
    ]
    print(f"{STEPS} steps in one go ...", flush=True)
    launch(folder, "uninterrupted", options, *short)
    print("the same, interrupted after a step ...", flush=True)
    launch(folder, "resumed", options, *short, "run.max_hours=1e-9")
    steps = len(read_results(folder / "resumed")["curves"]["train/loss"])
    if steps != 1:
        return False, f"the run was to be interrupted after a step and made {steps}"
    print("and on to the end ...", flush=True)
    launch(folder, "resumed", options, *short)
    uninterrupted = read_results(folder / "uninterrupted")
    resumed = read_results(folder / "resumed")
    if not find_differences(resumed, uninterrupted):
        return judge(uninterrupted, resumed)
    print("they differ; in one go once more, to see whether that is the same twice ...", flush=True)
    launch(folder, "repeated", options, *short)
    return judge(uninterrupted, resumed, read_results(folder / "repeated"))


def main(argv: list[str] | None = None) -> None:
    args = sys.argv[1:] if argv is None else argv
    options = [arg for arg in args if arg != "--verify-resume"]
    try:
        overrides = [arg for arg in options if not arg.startswith(("--gpus=", "--hostfile="))]
        take_options(overrides, {"--gpus": None, "--hostfile": None})  # they are launch.sh's
        config = load_config(overrides)
        build_ds_config(config)
        parent = Path(config.run.dir)
        is_new = not parent.exists()
        parent.mkdir(parents=True, exist_ok=True)
    except ConfigError as error:
        exit_with_config_error(error)
    # In run.dir, which all machines of a cluster can see.
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=parent) as folder:
        passed, message = verify(config, options, Path(folder))
    if is_new:
        parent.rmdir()
    print(
        f"compared    {', '.join(CURVES)} of every step, order of the examples, generators of "
        "every rank, masters and Adam moments, exported weights\n"
        f"result      {message}"
    )
    sys.exit(not passed)


if __name__ == "__main__":
    main()
