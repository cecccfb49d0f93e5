"""A model is asked with the prompt that it was trained with, or its use is refused."""

import json

import pytest

from loop.commands import generate
from loop.config.schema import ConfigError
from loop.data import soap
from loop.generation import prompt as prompts
from loop.generation.prompt import check_prompt, describe_prompt
from loop.model.loading import load_tokenizer


@pytest.fixture
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def written(folder, **trained) -> str:
    (folder / "trained.json").write_text(json.dumps(trained))
    return str(folder)


def test_the_hash_is_of_every_text(tokenizer, monkeypatch):
    before = describe_prompt(tokenizer)
    assert (before["system"], before["request"]) == (soap.SYSTEM, soap.REQUEST)
    assert before["headings"] == soap.NAMES
    for name, value in (("SYSTEM", "x"), ("REQUEST", "x"), ("HEADINGS", ("S",))):
        with monkeypatch.context() as patch:
            patch.setattr(prompts, name, value)
            after = describe_prompt(tokenizer)
        assert after["sha256"] != before["sha256"], name
        assert after["chat_template_sha256"] == before["chat_template_sha256"]
    tokenizer.chat_template += " "
    after = describe_prompt(tokenizer)
    assert after["sha256"] == before["sha256"]
    assert after["chat_template_sha256"] != before["chat_template_sha256"]


def test_a_prompt_or_template_of_another_kind_is_refused(tokenizer, tmp_path, monkeypatch):
    folder = written(tmp_path, prompt=describe_prompt(tokenizer))
    check_prompt("--adapter", folder, tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template += " "
    with pytest.raises(ConfigError, match="--adapter .*another chat template.*--any-prompt"):
        check_prompt("--adapter", folder, tokenizer)
    tokenizer.chat_template = template
    monkeypatch.setattr(prompts, "REQUEST", "Write it.")
    with pytest.raises(ConfigError, match="another prompt than this version writes"):
        check_prompt("--adapter", folder, tokenizer)


@pytest.mark.parametrize("trained", [{}, {"prompt": None}, {"base": "x"}])
def test_a_model_that_names_no_prompt_passes(tokenizer, tmp_path, trained):
    check_prompt("--adapter", str(tmp_path), tokenizer)  # without trained.json
    check_prompt("--adapter", written(tmp_path, **trained), tokenizer)


@pytest.mark.parametrize("text", ["{", "[]", '{"prompt": "x"}'])
def test_a_broken_file_is_said(tokenizer, tmp_path, text):
    (tmp_path / "trained.json").write_text(text)
    with pytest.raises(ConfigError, match="--base .*trained.json is broken"):
        check_prompt("--base", str(tmp_path), tokenizer)


def test_generate_refuses_unless_told(trained, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, and no model is loaded. With --any-prompt it writes the note."""
    dialogue = tmp_path / "d.txt"
    dialogue.write_text("Doctor: 5?\nPatient: pain")
    args = ["--adapter", str(trained / "adapter"), "--dialogue", str(dialogue)]
    args += ["--max-new-tokens", "4"]
    monkeypatch.setattr(prompts, "SYSTEM", "You are a scribe.")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(generate, "load_for_generation", lambda *_: pytest.fail("a model was loaded"))
        generate.main(args)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1, err
    assert err.startswith("error: --adapter") and "--any-prompt" in err and "pain" not in err
    generate.main([*args, "--any-prompt"])
    assert capsys.readouterr().out
