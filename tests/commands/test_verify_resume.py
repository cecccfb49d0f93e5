"""`train --verify-resume`: how it judges, and once for real."""

import copy
import os
import subprocess

import pytest
import torch
from helpers import CPU, PYTHON, ROOT

from loop.commands import verify_resume
from loop.commands.verify_resume import find_differences, judge, largest_difference, verify
from loop.config.schema import Config


def made() -> dict:
    curve = [(step, 1.0 / step) for step in range(1, 5)]
    return {
        "curves": {"train/loss": curve, "train/grad_norm": curve, "train/lr": curve},
        "order of the examples": {"seed": 1},
        "generators of every rank": ["a"],
        "masters and Adam moments": [4, "x"],
        "exported weights": {"w": torch.ones(2)},
    }


def changed(scale: float = 1.0, **parts) -> dict:
    it = copy.deepcopy(made()) | parts
    it["curves"]["train/loss"] = [
        (step, value * scale) for step, value in it["curves"]["train/loss"]
    ]
    return it


def test_the_same_to_the_bit_is_proof():
    assert judge(made(), made()) == (
        True,
        "the resumed run equals the uninterrupted one to the bit",
    )


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (changed(1 + 1e-12), "train/loss"),
        (changed(**{"order of the examples": {"seed": 2}}), "order of the examples"),
        (
            changed(**{"exported weights": {"w": torch.tensor([1.0, 1.0 + 1e-7])}}),
            "exported weights",
        ),
        (changed(**{"exported weights": {}}), "exported weights"),
        (changed(**{"generators of every rank": ["b"]}), "generators"),
        (changed(**{"masters and Adam moments": [4, "y"]}), "masters"),
    ],
)
def test_any_difference_on_a_machine_that_repeats_itself_is_a_failure_and_named(other, named):
    proved, said = judge(made(), other, repeated=made())
    assert not proved and named in said and len(find_differences(other, made())) == 1


def test_where_kernels_do_not_repeat_themselves_the_spread_is_stated():
    proved, said = judge(made(), changed(1 + 2e-6), repeated=changed(1 + 1e-6))
    assert proved and "2.0e-06" in said and "1.0e-06" in said
    assert not judge(made(), changed(1 + 1e-3), repeated=changed(1 + 1e-6))[0]
    assert not judge(made(), changed(1 + 4e-6), repeated=changed(1 + 1e-6))[0]
    for exact in ({"order of the examples": {"seed": 2}}, {"generators of every rank": ["b"]}):
        assert not judge(made(), changed(1 + 1e-6, **exact), repeated=changed(1 + 1e-6))[0]
    of_norms = changed()
    of_norms["curves"]["train/grad_norm"] = [(step, 2.0) for step in range(1, 5)]
    assert largest_difference(of_norms, made()) > 0.9
    short = changed()
    short["curves"]["train/loss"] = short["curves"]["train/loss"][:2]
    assert largest_difference(short, made()) == float("inf")


def test_a_run_that_was_not_interrupted_proves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(verify_resume, "launch", lambda *args: None)
    monkeypatch.setattr(verify_resume, "read_results", lambda folder: made())
    proved, said = verify(Config(base="x", data={"train": "x"}), [], tmp_path)
    assert not proved and said == "the run was to be interrupted after a step and made 4"


@pytest.mark.slow
def test_the_proof_on_this_machine(config_file):
    """For real: it passes, says what it compared, and leaves nothing behind."""
    env = os.environ | CPU | {"LOOP_PYTHON": PYTHON}
    command = [
        str(ROOT / "launch.sh"),
        "train",
        "--verify-resume",
        "--config",
        str(config_file),
        "--gpus",
        "2",
        "lora.lora_dropout=0.2",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "uninterrupted one to the bit" in done.stdout
        and "train/grad_norm" in done.stdout
    ), done.stdout + done.stderr
    assert not (config_file.parent / "runs").exists()
    wrong = subprocess.run([*command, "lr=abc"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and "lr='abc'" in wrong.stderr
