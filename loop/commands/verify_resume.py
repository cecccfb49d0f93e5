"""`./launch.sh train --verify-resume`: proves on this machine, with this configuration, that a resumed run is the unbroken one.

Four steps in one go, and the same four in two launches, of which the first is ended by a time limit after a step. Then everything that
training makes is compared to the bit. Where a GPU's kernels add in no fixed order, even two unbroken runs differ: then a third
one shows by how much, and the resumed run may differ by as much.
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


def launch(folder: Path, name: str, options: list[str], *more: str) -> None:
    """One `./launch.sh train` in `folder`. Its output is shown when it fails, which ends the proof with its exit code."""
    command = [
        str(ROOT / "launch.sh"),
        "train",
        *options,
        f"run.dir={folder}",
        f"run.name={name}",
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr)
        sys.exit(done.returncode)


def results(folder: Path) -> dict:
    """What a run made: its curves, the order of its examples, generators and counters, and the whole state as hashes and tensors."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "checkpoints" / "newest" / "manifest.json").read_text())
    (exported,) = [p for name in ("adapter", "model") if (p := folder / name).is_dir()]
    return {
        "curves": {
            key: [(line["step"], line[key]) for line in lines if key in line] for key in CURVES
        },
        "order of the examples": manifest["identity"]["plan"],
        "generators of every rank": manifest["rng"],
        "masters and Adam moments": [manifest["optimizer_step"], manifest["files"]],
        "exported weights": {
            k: t
            for path in sorted(exported.glob("*.safetensors"))
            for k, t in load_file(path).items()
        },
    }


def differences(ours: dict, theirs: dict) -> list[str]:
    """The names of what is not the same to the bit. Both as `results` gives them."""
    found = [key for key in CURVES if ours["curves"][key] != theirs["curves"][key]]
    found += [
        key
        for key in ours
        if key not in ("curves", "exported weights") and ours[key] != theirs[key]
    ]
    weights = ours["exported weights"], theirs["exported weights"]
    same = weights[0].keys() == weights[1].keys() and all(
        torch.equal(t, weights[1][k]) for k, t in weights[0].items()
    )
    return found + ([] if same else ["exported weights"])


def spread(ours: dict, theirs: dict) -> float:
    """The largest relative distance of the losses and gradient norms of two runs; infinite when they made other steps."""
    pairs = [
        (a, b) for key in CURVES[:2] for a, b in zip(ours["curves"][key], theirs["curves"][key])
    ]
    if len(pairs) < 2 * STEPS or any(a[0] != b[0] for a, b in pairs):
        return float("inf")
    return max(abs(a[1] - b[1]) / max(abs(b[1]), 1e-12) for a, b in pairs)


def verdict(whole: dict, resumed: dict, again: dict | None = None) -> tuple[bool, str]:
    """(whether resuming is proved, what to say). again: a second unbroken run, where the first two differ."""
    other = differences(resumed, whole)
    if not other:
        return True, "the resumed run is the unbroken one to the bit"
    if again is None or not differences(again, whole):
        return (
            False,
            f"NOT the same: {', '.join(other)}; two unbroken runs are the same, so it is the resume that changes them",
        )
    here, apart = spread(resumed, whole), spread(again, whole)
    exact = (
        "order of the examples" not in other
        and "train/lr" not in other
        and "generators of every rank" not in other
    )
    said = (
        f"losses and norms of the resumed run differ by up to {here:.1e} from the unbroken one, those of two unbroken runs by {apart:.1e}: "
        "kernels of this machine add in no fixed order"
    )
    return exact and here <= 3 * apart, said


def prove(config: Config, options: list[str], folder: Path) -> tuple[bool, str]:
    """Runs and compares. options: the user's arguments for launch.sh; folder: an empty one for the runs."""
    few = [
        f"max_steps={STEPS}",
        f"warmup_steps={min(config.warmup_steps, STEPS - 1)}",
        "data.valid=null",
        "data.valid_fraction=0",
        "monitor.sample_notes=[]",
        "run.resume=true",
        "run.max_hours=null",
        "run.export_check_examples=0",
        f"run.deterministic={'run.deterministic=false' not in options}",
    ]
    print(f"{STEPS} steps in one go ...", flush=True)
    launch(folder, "whole", options, *few)
    print("the same, broken off after a step ...", flush=True)
    launch(folder, "resumed", options, *few, "run.max_hours=1e-9")
    if (made := len(results(folder / "resumed")["curves"]["train/loss"])) != 1:
        return False, f"the run was to be broken off after a step and made {made}"
    print("and on to the end ...", flush=True)
    launch(folder, "resumed", options, *few)
    whole, resumed = results(folder / "whole"), results(folder / "resumed")
    if not differences(resumed, whole):
        return verdict(whole, resumed)
    print("they differ; in one go once more, to see whether that is the same twice ...", flush=True)
    launch(folder, "again", options, *few)
    return verdict(whole, resumed, results(folder / "again"))


def main(argv: list[str] | None = None) -> None:
    options = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--verify-resume"]
    try:
        own = [a for a in options if not a.startswith(("--gpus=", "--hostfile="))]
        take_options(own, {"--gpus": None, "--hostfile": None})  # they are launch.sh's
        config = load_config(own)
        build_ds_config(config)
        parent = Path(config.run.dir)
        made = not parent.exists()
        parent.mkdir(parents=True, exist_ok=True)
    except ConfigError as error:
        exit_with_config_error(error)
    with tempfile.TemporaryDirectory(
        prefix=".verify-", dir=parent
    ) as folder:  # where the machines of a cluster all can see it
        proved, said = prove(config, options, Path(folder))
    if made:
        parent.rmdir()
    print(
        f"compared    {', '.join(CURVES)} of every step, order of the examples, generators of every rank, masters and Adam moments, exported "
        f"weights\nverdict     {said}"
    )
    sys.exit(not proved)


if __name__ == "__main__":
    main()
