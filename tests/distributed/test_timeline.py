"""Every second of a run belongs to one part."""

import json

import pytest

from loop.distributed import timeline


def test_seconds_count_for_the_innermost_part(monkeypatch):
    clock = iter([10.0, 13.0, 14.0, 16.0, 20.0, 25.0])
    monkeypatch.setattr(timeline.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(timeline, "_timeline", timeline.Timeline(8.0, "imports"))
    timeline.enter(timeline.OTHER)  # at 10

    @timeline.timed("base")
    def load():  # at 13
        with timeline.timed("kernel tests"):  # from 14 to 16
            pass

    load()  # until 20
    seconds = timeline.so_far()  # at 25
    assert seconds == {"imports": 2.0, "kernel tests": 2.0, "base": 5.0, "other": 8.0}
    assert (
        timeline.describe(seconds) == "17.0 s: imports 2.0, kernel tests 2.0, base 5.0, other 8.0"
    )


def test_a_part_that_raises_is_left(monkeypatch):
    monkeypatch.setattr(timeline, "_timeline", timeline.Timeline(0.0, timeline.OTHER))
    with pytest.raises(ValueError), timeline.timed("base"):
        raise ValueError
    assert timeline.enter("steps") == timeline.OTHER


def test_a_run_accounts_for_all_its_seconds(trained):
    report = json.loads((trained / "report.json").read_text())
    whole, start = report["time"], report["time_to_first_step"]
    for name in ("imports", "data", "base", "engine", "first step", "evaluation", "sample notes"):
        assert 0 < start[name] <= whole[name], name
    for name in ("steps", "checkpoints", "export", "audit"):
        assert name not in start and whole[name] > 0, name
    assert report["seconds"] < sum(whole.values())  # that begins later, with the observers
    said = (trained.parent / "stdout").read_text()
    assert f"first step  done after {sum(start.values()):.1f} s: " in said
