"""A push uploads a model with its card, privately, and nothing else of the folder."""

import json
import shutil
from types import SimpleNamespace

import httpx
import pytest

from loop.commands import export
from loop.config.schema import ConfigError
from loop.export import hub
from loop.export.hub import files_to_push


class FakeHub:
    """Records what a push asks of the hub."""

    def __init__(self, private=True, fails=None):
        self.private, self.fails, self.calls = private, fails, []

    def __call__(self):
        return self

    def create_repo(self, repo, *, private, exist_ok):
        if self.fails:
            raise self.fails
        self.calls.append(("create", repo, private))
        return f"https://hub/{repo}"

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo, operations, commit_message):
        self.calls.append(("commit", repo, [o.path_in_repo for o in operations]))


@pytest.fixture
def adapter(trained, tmp_path):
    """The run's adapter, with files beside it that are nobody's business."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    (folder / "notes.jsonl").write_text('{"dialogue": "Mr. Smith"}')
    (folder / ".token").write_text("hf_secret")
    return folder


def test_a_dry_run_lists_what_would_be_uploaded(adapter, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", None)  # it is not asked
    export.main(["--model", str(adapter), "--push", "clinic/soap", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[-1] for line in lines[:-1]}
    assert {"README.md", "trained.json", "adapter_config.json"} < named
    assert {"adapter_model.safetensors", "tokenizer.json"} < named
    assert not named & {"notes.jsonl", ".token"}
    assert lines[-1] == "dry run: nothing was uploaded to clinic/soap (private)"


def test_a_push_is_one_commit_to_a_private_repository(adapter, monkeypatch, capsys):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    export.main(["--model", str(adapter), "--push", "clinic/soap"])
    (create, commit) = fake.calls
    assert create == ("create", "clinic/soap", True)
    assert commit[2] == [upload.name for upload in files_to_push(adapter, "clinic/soap")]
    assert "pushed to https://hub/clinic/soap (private)" in capsys.readouterr().out
    export.main(["--model", str(adapter), "--push", "clinic/soap", "--public"])
    assert fake.calls[2] == ("create", "clinic/soap", False)


def test_no_path_of_this_machine_is_uploaded(adapter, tmp_path):
    for upload in files_to_push(adapter, "clinic/soap"):
        content = (
            upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
        )
        if upload.name in ("trained.json", "adapter_config.json"):
            assert str(tmp_path).encode() not in content and b"/tmp" not in content
            assert upload.size == len(content)
    said = json.loads((adapter / "trained.json").read_text())
    assert "/" in said["base"]  # a folder, so that the above says something


def test_a_push_that_cannot_be_is_one_line(adapter, trained, monkeypatch, capsys):
    offline = httpx.ConnectError("Name or service not known")
    for folder, repo, fake, says in (
        (adapter, "soap", FakeHub(), "is not OWNER/NAME"),
        (adapter, "clinic/so ap", FakeHub(), "is not OWNER/NAME"),
        (trained, "clinic/soap", FakeHub(), "is not what a run, merge or export wrote"),
        (adapter, "clinic/soap", FakeHub(private=False), "is public; add --public"),
        (adapter, "clinic/soap", FakeHub(fails=offline), "not reached: Name or service"),
    ):
        monkeypatch.setattr(hub, "HfApi", fake)
        with pytest.raises(SystemExit) as caught:
            export.main(["--model", str(folder), "--push", repo])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and says in err and err.count("\n") == 1
        assert not [call for call in fake.calls if call[0] == "commit"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--checkpoint", "c"], "--out"),
        (["--model", "m"], "add --gguf, or --push"),
        (["--model", "m", "--out", "o"], "nothing is written"),
        (["--checkpoint", "c", "--gguf", "f16", "--out", "o"], "whole model"),
        (["--model", "m", "--gguf", "f16", "--out", "o", "--dry-run"], "are for --push"),
    ],
)
def test_options_that_do_not_go_together(words, says):
    with pytest.raises(ConfigError, match=says):
        export.check_arguments(export.parse_arguments(words))
