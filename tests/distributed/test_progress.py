"""What is waited for is said, with how far it is; a moment is not, and neither are other ranks."""

import re
import sys
import time

import pytest

from loop.distributed import progress
from loop.distributed.progress import Progress, track


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name in ("FIRST_SECONDS", "EVERY_SECONDS", "BAR_SECONDS"):
        monkeypatch.setattr(progress, name, 0.05)


def wait_in(items: list) -> None:
    for number in track(items, "quantising the base", "modules"):
        if number == 2:
            time.sleep(0.3)


def test_a_log_gets_lines_with_how_far_it_is(impatient, capsys):
    wait_in([1, 2, 3])
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"quantising the base: 1 of 3 modules, \d+ s", first)
    assert re.fullmatch(r"quantising the base: done in \d+ s", last)


def test_a_moment_is_not_worth_a_line(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    wait_in([1, 3])
    with Progress("compiling"):
        pass
    assert capsys.readouterr().err == ""


def test_one_rank_speaks_for_all(impatient, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    wait_in([1, 2, 3])
    assert capsys.readouterr().err == ""


def test_what_can_not_be_counted_is_measured_or_timed(impatient, capsys):
    with Progress("downloading", measure=lambda: "1.5 GiB"):
        time.sleep(0.2)
    with pytest.raises(ValueError), Progress("compiling"):
        time.sleep(0.2)
        raise ValueError
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading: 1.5 GiB, 0 s" and "downloading: done in 0 s" in lines
    assert lines[-1] == "compiling: 0 s"  # and no "done" after an error


def test_a_terminal_gets_a_bar_that_goes_away(impatient, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    wait_in([1, 2, 3])
    err = capsys.readouterr().err
    assert "quantising the base" in err and "1/3" in err and "done" not in err
    assert err.endswith("\r")
