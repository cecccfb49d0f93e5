"""A model is asked with the prompt that it was trained with, or its use is refused."""

import json
import shutil

import pytest

from loop.commands import generate
from loop.config.schema import REQUEST, SYSTEM, ConfigError, TaskConfig
from loop.data.soap import SOAP
from loop.generation.prompt import check_prompt, describe_prompt, task_of
from loop.model.loading import load_tokenizer


@pytest.fixture
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def written(folder, **trained) -> str:
    (folder / "trained.json").write_text(json.dumps(trained))
    return str(folder)


OTHER = TaskConfig(system="Scribe.", request="Write {part}.", headings={"Befund": "Status"})


def test_the_hash_is_of_every_text(tokenizer):
    """And a run without a task has the hash that runs before there were tasks had."""
    before = describe_prompt(tokenizer)
    assert before["sha256"] == "1157b5d539d703cd2c8dc433d625ac5426164f482f2a8384007eef6d9905e85e"
    assert (before["system"], before["request"]) == (SYSTEM, REQUEST)
    assert before["headings"] == dict(zip("SOAP", "Subjective Objective Assessment Plan".split()))
    texts = {"system": "x", "request": "x", "headings": {**SOAP.headings, "S": "Status"}}
    for name, value in texts.items():
        after = describe_prompt(tokenizer, TaskConfig(**{name: value}))
        assert after["sha256"] != before["sha256"], name
        assert after["chat_template_sha256"] == before["chat_template_sha256"]
    tokenizer.chat_template += " "
    after = describe_prompt(tokenizer)
    assert after["sha256"] == before["sha256"]
    assert after["chat_template_sha256"] != before["chat_template_sha256"]


def test_a_models_own_task_is_read_and_a_changed_text_or_template_refused(tokenizer, tmp_path):
    prompt = describe_prompt(tokenizer, OTHER)
    assert task_of({"prompt": prompt}) == OTHER
    assert task_of({"prompt": None}) == SOAP and task_of({}, OTHER) == OTHER
    folder = written(tmp_path, prompt=prompt)
    check_prompt("--adapter", folder, tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template += " "
    with pytest.raises(ConfigError, match="--adapter .*another chat template.*--any-prompt"):
        check_prompt("--adapter", folder, tokenizer)
    tokenizer.chat_template = template
    written(tmp_path, prompt=prompt | {"request": "Write it.\n\n"})
    with pytest.raises(ConfigError, match="another prompt than trained.json says now"):
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
    args = ["--adapter", str(tmp_path / "adapter"), "--dialogue", str(dialogue)]
    args += ["--max-new-tokens", "4"]
    trained_json = trained / "adapter" / "trained.json"
    facts = json.loads(trained_json.read_text())
    facts["prompt"]["system"] = "You are a scribe."
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", adapter)
    (adapter / "trained.json").write_text(json.dumps(facts))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(generate, "load_for_generation", lambda *_: pytest.fail("a model was loaded"))
        generate.main(args)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1, err
    assert err.startswith("error: --adapter") and "--any-prompt" in err and "pain" not in err
    generate.main([*args, "--any-prompt"])
    assert capsys.readouterr().out
