"""`./launch.sh break`: one of two equal runs has a planted mistake, and both curves come out."""

import inspect
import json
import os
import runpy
import subprocess

import pytest
from helpers import CPU, PYTHON, ROOT, run
from mistakes import MISTAKES, SHOWN_ONLY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BROKEN = ROOT / "tests" / "broken"


def launch(*args: str, **options) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= CPU | {"LOOP_PYTHON": PYTHON}
    return run([str(ROOT / "launch.sh"), "break", *args], env=env, **options)


@pytest.fixture(scope="module")
def shown() -> dict:
    return runpy.run_path(str(BROKEN / "shown.py"))["SHOWN"]


def test_what_is_shown_is_what_is_planted_and_is_explained(shown):
    assert not set(MISTAKES) & set(SHOWN_ONLY)
    assert set(SHOWN_ONLY) < set(shown) <= set(MISTAKES) | set(SHOWN_ONLY)
    for name, how in shown.items():
        assert 200 < len(how.paragraph) < 900 and any(c.isdigit() for c in how.paragraph), name


def test_without_a_name_or_with_a_wrong_one_it_lists_them(shown):
    listed, wrong = launch(), launch("no_such_thing")
    assert listed.returncode == 0 and not listed.stderr
    assert wrong.returncode == 2 and not wrong.stdout
    assert wrong.stderr.startswith("error: break no_such_thing: there is no such mistake")
    for name in shown:
        what = inspect.getdoc((MISTAKES | SHOWN_ONLY)[name]).split("\n\n")[0].replace("\n", " ")
        for text in (listed.stdout, wrong.stderr):
            (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
            assert line.endswith(what), line


def test_a_wrong_key_is_one_line_and_exit_2(tmp_path):
    done = launch("no_clipping", "--dir", str(tmp_path), "lrr=1")
    assert done.returncode == 2 and "lrr" in done.stderr and "Traceback" not in done.stderr


def test_two_runs_their_curves_and_the_picture(tmp_path):
    """A resume with stale masters: both runs are the same up to it, then the wrong one is worse."""
    options = ["--steps", "4", "--dir", "runs here"]
    settings = ["data.limit=12", "max_seq_len=1280", "monitor.eval_steps=9"]
    done = launch("stale_resume", *options, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "runs here" / "stale_resume"
    losses = {}
    for name in ("right", "wrong"):
        log = (folder / name / "metrics.jsonl").read_text().splitlines()
        lines = [line for line in map(json.loads, log) if "train/loss" in line]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all("train/grad_norm" in line for line in lines)
        losses[name] = [line["train/loss"] for line in lines]
        board = EventAccumulator(str(folder / name / "tensorboard"))
        board.Reload()
        assert {"train/loss", "train/grad_norm", "eval/loss"} <= set(board.Tags()["scalars"])
        assert [e.value for e in board.Scalars("train/loss")] == pytest.approx(losses[name])
    # The loaded weights are right until the first update after them, at the end of step 3.
    assert losses["right"][:3] == losses["wrong"][:3], losses
    assert losses["wrong"][3] > losses["right"][3] + 0.3, losses
    gradient = json.loads((folder / "gradient.json").read_text())
    assert gradient == {"step": 3, "gradient_distance": 0.0}
    with Image.open(folder / "stale_resume.png") as picture:
        pixels = picture.convert("RGB")
        assert picture.width == 1560 and picture.height > 400
        colours = {colour for _, colour in pixels.getcolors(1 << 20)}
    assert {(0x7D, 0xB4, 0xE6), (0xC8, 0x32, 0x1E)} <= colours  # both curves are in it
    for text in ("last value of", "tensorboard --logdir", str(folder)):
        assert text in done.stdout
