"""Seeing what is trained on."""

import pytest

from loop.cli import load_config
from loop.config import ConfigError
from loop.data import Example, load_examples
from loop.model import load_tokenizer
from loop.preview import check_example, main, show_example


def test_the_tokens_shown_are_the_examples(config_file):
    config = load_config(["--config", str(config_file)])
    tokenizer = load_tokenizer(config.base)
    example = load_examples(config, tokenizer, "train")[0][1]
    shown = show_example(example, tokenizer, color=False)
    head, body = shown.split("\n", 1)
    assert head == f"train-1: {len(example)} tokens, {example.num_targets} supervised"
    marked = [piece for piece in body.split("|[")[1:]]
    assert len(marked) == example.num_targets and marked[-1] == "</s>]"
    assert "\033[32m" in show_example(example, tokenizer, color=True)


def test_an_unsupervised_eos_is_found(config_file):
    config = load_config(["--config", str(config_file)])
    tokenizer = load_tokenizer(config.base)
    example = load_examples(config, tokenizer, "train")[0][0]
    check_example(example, tokenizer)
    example.labels[-1] = -100
    with pytest.raises(ConfigError, match="id train-0: .* supervised '</s>'"):
        check_example(Example(example.id, example.input_ids, example.labels), tokenizer)


def test_the_commands(config_file, capsys):
    main(["--config", str(config_file), "--id", "train-3"])
    assert capsys.readouterr().out.startswith("train-3: ")
    for args, words in ((["--id", "nobody"], "--id nobody"), (["--rows", "x"], "--rows x")):
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(config_file), *args])
        assert ended.value.code == 2 and words in capsys.readouterr().err
