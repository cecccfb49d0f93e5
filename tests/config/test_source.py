"""The digest of the source code changes with every change that could change a result."""

import shutil

import pytest
from helpers import ROOT

from loop.config import source
from loop.config.source import source_digest


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of loop/data, as the repository that `source_digest` looks at."""
    shutil.copytree(
        ROOT / "loop" / "data",
        tmp_path / "loop" / "data",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    monkeypatch.setattr(source, "ROOT", tmp_path)
    return tmp_path / "loop" / "data"


def add_a_file(folder):
    (folder / "new_reader.py").write_text("")


def add_a_file_in_a_new_folder(folder):
    (folder / "formats").mkdir()
    (folder / "formats" / "visit.py").write_text("READERS = {}\n")


def move_a_file(folder):
    (folder / "formats").mkdir()
    (folder / "report.py").rename(folder / "formats" / "report.py")


def rename_a_file(folder):
    (folder / "report.py").rename(folder / "reports.py")


def remove_a_file(folder):
    (folder / "report.py").unlink()


def change_a_byte(folder):
    path = folder / "soap.py"
    path.write_bytes(path.read_bytes() + b"\n")


def swap_two_files(folder):
    (folder / "cache.py").rename(folder / "other.py")
    (folder / "report.py").rename(folder / "cache.py")
    (folder / "other.py").rename(folder / "report.py")


@pytest.mark.parametrize(
    "change",
    [
        add_a_file,
        add_a_file_in_a_new_folder,
        move_a_file,
        rename_a_file,
        remove_a_file,
        change_a_byte,
        swap_two_files,
    ],
)
def test_every_change_of_the_source_changes_the_digest(tree, change):
    before = source_digest("loop/data")
    assert source_digest("loop/data") == before
    change(tree)
    assert source_digest("loop/data") != before


def test_files_that_are_no_source_do_not_count(tree):
    before = source_digest("loop/data")
    (tree / "README.md").write_text("words")
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "soap.cpython-311.pyc").write_bytes(b"\0")
    assert source_digest("loop/data") == before


def test_other_folders_do_not_count_unless_named(tree):
    other = tree.parent / "kernels"
    other.mkdir()
    (other / "attention.py").write_text("")
    assert source_digest("loop/data") != source_digest("loop/data", "loop/kernels")
    before = source_digest("loop/data")
    (other / "attention.py").write_text("x = 1\n")
    assert source_digest("loop/data") == before


def test_a_folder_that_is_gone_is_an_error_and_not_an_empty_digest(tree):
    tree.rename(tree.with_name("dataset"))
    with pytest.raises(FileNotFoundError, match="holds no source"):
        source_digest("loop/data")
