"""Files that are the old or the new ones, whenever the power fails, and nobody else's."""

import pytest
from helpers import note_disk_operations

from loop.distributed.files import write_atomically


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = note_disk_operations(monkeypatch, "replace")
    write_atomically(tmp_path / "report.json", "new")
    assert done == [
        ("fsync", ".writing-report.json"),
        ("replace", "report.json"),
        ("fsync", tmp_path.name),
    ]
    assert (tmp_path / "report.json").read_text() == "new"
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o600


def test_a_link_is_replaced_or_refused_and_never_followed(tmp_path):
    others = tmp_path / "others.txt"
    others.write_text("theirs")
    link = tmp_path / "report.json"
    link.symlink_to(others)
    write_atomically(link, "new")
    assert not link.is_symlink() and (link.read_text(), others.read_text()) == ("new", "theirs")
    (tmp_path / ".writing-report.json").symlink_to(others)
    with pytest.raises(OSError):
        write_atomically(link, "newer")
    assert (link.read_text(), others.read_text()) == ("new", "theirs")
