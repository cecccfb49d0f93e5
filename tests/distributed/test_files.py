"""Files that are the old or the new ones, whenever the power fails, and nobody else's."""

import pytest
from helpers import note_disk_operations

from loop.config.schema import ConfigError
from loop.distributed.files import atomic_folder, check_writable, write_atomically


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


def test_what_can_not_be_written_is_said_before_the_work(tmp_path):
    """A file where a folder is needed, no folder, a folder where a file is needed."""
    file = tmp_path / "file"
    file.write_text("mine")
    for path, reason in (
        (file / "x", "there is no such folder"),
        (tmp_path / "none" / "x", "there is no such folder"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "Too many levels"),
    ):
        if path.name == "loop":
            path.symlink_to(path)
        with pytest.raises(ConfigError, match=f"^--html .*: {reason}"):
            check_writable("--html", path)
    check_writable("--html", file)
    check_writable("--html", tmp_path / "new")
    assert file.read_text() == "mine" and not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"^--out .*: cannot be made \(Not a directory\)$"):
        with atomic_folder(file / "out"):
            raise AssertionError
