"""The notebook for students runs from top to bottom, and says what it promises."""

import json
import os

import pytest
from helpers import ROOT

TOUR = json.loads((ROOT / "loop" / "embedded" / "tour.ipynb").read_text())
CODE = ["".join(c["source"]) for c in TOUR["cells"] if c["cell_type"] == "code"]
SHORTER = {
    "STEPS = 30\n": "STEPS = 3\n",
    '"batch_size=2"': '"batch_size=1"',
    '"data.limit=200"': '"data.limit=40"',
    "max_new_tokens=160": "max_new_tokens=8",
}


def run_tour(monkeypatch, changes: dict[str, str]) -> dict:
    """The names that its cells leave. changes: of what stands in them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert all("".join(CODE).count(old) == 1 for old in changes)
    names: dict = {"__name__": "tour"}
    for number, cell in enumerate(CODE):
        for old, new in changes.items():
            cell = cell.replace(old, new)
        exec(compile(cell, f"cell {number}", "exec"), names)
    return names


def far(names: dict, one: str, other: str) -> float:
    return ((names[one] - names[other]).norm() / names[other].norm()).item()


def check(names: dict) -> None:
    assert far(names, "right", "packed") < 1e-4 < 1e-2 < far(names, "wrong", "packed")
    assert names["note"].text.strip()
    picture = names["Curve"](names["losses"], "loss")._repr_svg_()
    assert picture.startswith("<svg") and picture.count(",") == len(names["losses"])


def test_it_runs_from_top_to_bottom(monkeypatch):
    check(run_tour(monkeypatch, SHORTER))


@pytest.mark.slow
def test_the_whole_of_it_learns(monkeypatch, capsys):
    names = run_tour(monkeypatch, {})
    check(names)
    assert names["losses"][-1] < names["losses"][0] / 3
    print(capsys.readouterr().out)


def test_it_is_stored_without_results():
    """Outputs would hold what a machine printed, and grow old."""
    assert TOUR["nbformat"] == 4 and len(CODE) >= 8
    for cell in TOUR["cells"]:
        assert cell["source"] and not cell.get("outputs") and not cell.get("execution_count")
    assert os.path.getsize(ROOT / "loop" / "embedded" / "tour.ipynb") < 20_000
