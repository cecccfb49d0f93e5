"""`./launch.sh break`: a mistake is planted in one of two runs that are otherwise the same, and both curves come out."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT
from mistakes import MISTAKES, SHOWN_ONLY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BROKEN = ROOT / "tests" / "broken"


def launch(*args: str, **options) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"LOOP_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(ROOT / "launch.sh"), "break", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def shown() -> dict:
    return runpy.run_path(str(BROKEN / "shown.py"))["SHOWN"]


def test_what_is_shown_is_what_is_planted_and_is_explained(shown):
    assert not set(MISTAKES) & set(SHOWN_ONLY) and set(SHOWN_ONLY) < set(shown) <= set(
        MISTAKES
    ) | set(SHOWN_ONLY)
    for name, how in shown.items():
        assert 200 < len(how.paragraph) < 900 and any(c.isdigit() for c in how.paragraph), name


def test_without_a_name_or_with_a_wrong_one_it_lists_them(shown):
    listed, wrong = launch(), launch("no_such_thing")
    assert listed.returncode == 0 and not listed.stderr
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("error: break no_such_thing: there is no such mistake")
        and not wrong.stdout
    )
    for name in shown:
        what = (MISTAKES | SHOWN_ONLY)[name].__doc__.split("\n\n")[0]
        for text in (listed.stdout, wrong.stderr):
            (found,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
            assert found.endswith(what), found


def test_a_wrong_key_is_one_line_and_exit_2(tmp_path):
    done = launch("no_clipping", "--dir", str(tmp_path), "lrr=1")
    assert done.returncode == 2 and "lrr" in done.stderr and "Traceback" not in done.stderr


def test_two_runs_their_curves_and_the_picture(tmp_path):
    """A resume with stale masters: both runs are broken off, the same up to there, and only the wrong one falls back."""
    done = launch(
        "stale_resume",
        "--steps",
        "4",
        "--dir",
        "runs here",
        "data.limit=12",
        "max_seq_len=1280",
        "monitor.eval_steps=9",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder, curves = tmp_path / "runs here" / "stale_resume", {}
    for name in ("right", "wrong"):
        lines = [
            json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        steps = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
        assert [step for step, _ in steps] == [1, 2, 3, 4] and all(
            "train/grad_norm" in line for line in lines if "train/loss" in line
        )
        curves[name] = [loss for _, loss in steps]
        board = EventAccumulator(str(folder / name / "tensorboard"))
        board.Reload()
        assert {"train/loss", "train/grad_norm", "eval/loss"} <= set(board.Tags()["scalars"])
        assert [e.value for e in board.Scalars("train/loss")] == pytest.approx(curves[name])
    # the loaded weights are right until the first update after them, at the end of step 3
    assert (
        curves["right"][:3] == curves["wrong"][:3] and curves["wrong"][3] > curves["right"][3] + 0.3
    ), curves
    assert json.loads((folder / "gradient.json").read_text()) == {
        "step": 3,
        "gradient_distance": 0.0,
    }
    with Image.open(folder / "stale_resume.png") as picture:
        pixels = picture.convert("RGB")
        assert picture.width == 1560 and picture.height > 400
        colours = {colour for _, colour in pixels.getcolors(1 << 20)}
    assert {(0x7D, 0xB4, 0xE6), (0xC8, 0x32, 0x1E)} <= colours  # both curves are in it
    assert (
        "last value of" in done.stdout
        and "tensorboard --logdir" in done.stdout
        and str(folder) in done.stdout
    )
