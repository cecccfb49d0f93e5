"""Hostile input through the real commands: one line, nothing written elsewhere, no code run."""

import json
import random
import threading
from pathlib import Path

import pytest
import yaml
from harness import zygote_in
from helpers import ROOT
from hostile_bases import corpus, make
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from loop.checkpoint.run_dir import lock_folder, read_report, whole_lines, write_report
from loop.checkpoint.store import UNREADABLE, sealed, verified_manifest
from loop.config.cli import load_config
from loop.config.deepspeed import build_ds_config
from loop.config.plain_yaml import read_yaml
from loop.config.schema import Config, ConfigError
from loop.data.cache import read_cache, write_cache
from loop.data.dataset import load_examples
from loop.model.loading import load_tokenizer

EMBEDDED = str(ROOT / "loop/configs/embedded.yaml")
CORPUS = dict(corpus())
QUICK = (
    "template eats memory", "template recurses", "template renders nothing",
    "template ends in a surrogate", "template escapes the sandbox", "config gptq",
    "config model_type a list", "config num_hidden_layers=10000000", "config num_attention_heads=0",
    "config attention of no kind", "code in config.json, unknown kind",
    "code in tokenizer_config.json", "index of .bin", "index outside", "pickle only",
    "model.safetensors cut at 0.3",
)  # fmt: skip
ALIASES = "[" + ", ".join(["*a"] * 20) + "]"
BOMB = "{a: &a [1, 1], " + "b: &a " + ALIASES + ", c: &a " + ALIASES + ", d: &a " + ALIASES + "}"
OVERRIDES = (
    "lr=2024-13-45", "lr=!!int abc", "lr=" + "9" * 5000, "lr=.inf", "lora={on: 1}", "lora={~: 1}",
    "lora={1: 1}", "lora=&a [*a]", "lora={r: 1, r: 2}", f"lora={BOMB}", "lora.lora_dropout=null",
    "lora.rank_pattern={'(': 1}", "lora.layers_to_transform=x", "lora.task_type=X",
    "lora.r=1000000000", "lora.megatron_core=os", "batch_size=1e12", "batch_size=1000000000000",
    "epochs=1000000000", "run.name=../../x", "run.name=a/../../b", "\x1b[31mlr=1",
    "data.train=[[a]]", "betas=5", "seed=" + "9" * 400, "--config=", "max_seq_len=1e99",
)  # fmt: skip
SECTIONS = (
    {"zero_optimization": 5}, {"zero_optimization": {"stage": 3, "offload_optimizer": True}},
    {"fp16": []}, {"bf61": {"enabled": True}}, {"timers": 3}, {"steps_per_print": "x"},
    {"zero_optimization": {"stage": 3, "reduce_bucket_size": "x"}}, {"bf16": {"enabled": "x"}},
    {"zero_optimization": {"stage": 3, "offload_param": 5}}, {"communication_data_type": 5},
)  # fmt: skip


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with zygote_in(tmp_path_factory.mktemp("hostile")) as zygote:
        yield zygote


def mistakes_with(zygote, tiny_base: str, name: str) -> list[str]:
    """What `generate` does wrong with a base of the corpus; "y" is typed at whatever asks."""
    folder = make(tiny_base, CORPUS[name], zygote.folder / f"base-{zygote.count}")
    typed = ["--dialogue", str(ROOT / "tests" / "dialogue.txt"), "--max-new-tokens", "1"]
    outcome = zygote.run("generate", "--base", str(folder), *typed, typed="y\n" * 20)
    found = outcome.mistakes()
    if any(zygote.folder.rglob("CODE_RAN")):
        found.append("code of the base ran")
    return found


def test_hostile_bases_end_in_one_line(zygote, tiny_base):
    names = [name for name in QUICK if name in CORPUS]
    assert names == list(QUICK)
    found = {name: mistakes_with(zygote, tiny_base, name) for name in names}
    assert {name: mistakes for name, mistakes in found.items() if mistakes} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_every_hostile_base_ends_in_one_line(zygote, tiny_base, name):
    assert mistakes_with(zygote, tiny_base, name) == []


def test_configuration_bombs_end_in_one_line(zygote, config_file, tmp_path):
    for override in OVERRIDES:
        outcome = zygote.run("plan", "--config", str(config_file), override)
        assert (override, outcome.mistakes((2,))) == (override, [])
    for change in SECTIONS:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(json.loads((ROOT / "ds_config.json").read_text()) | change))
        outcome = zygote.run("plan", "--config", str(config_file), f"deepspeed={path}")
        # `plan` reads the file as the run does
        assert (change, outcome.mistakes((2,))) == (change, [])


KEYS = st.sampled_from([*Config.model_fields, "lora.r", "lora.x", "run.name", "data.train", "y"])
VALUES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["&a [*a]", "!!int x", "2024-13-45", ".inf", "-1", "1e400", "{on: 1}", "[[", "~", "{}"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.none() | st.booleans() | st.integers(), st.lists, max_leaves=5).map(json.dumps),
)


def check_override(key: str, value: str) -> None:
    """A configuration, or one line: no other exception comes out."""
    try:
        config = load_config(
            ["--config", str(ROOT / "loop/configs/embedded.yaml"), f"{key}={value}"]
        )
        if key != "deepspeed":
            build_ds_config(config)
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 1000


@settings(max_examples=100, deadline=None, database=None)
@seed(26)
@given(KEYS, VALUES)
def test_any_override_gives_a_configuration_or_a_line(key, value):
    check_override(key, value)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@seed(2026)
@given(KEYS, VALUES)
def test_ten_thousand_overrides_give_a_configuration_or_a_line(key, value):
    check_override(key, value)


def test_yaml_holds_what_a_configuration_needs():
    assert read_yaml("{a: 1, b: x, c: ~, d: [1.5, true], e: {f: 2024-01-01}}") == {
        "a": 1, "b": "x", "c": None, "d": [1.5, True], "e": {"f": "2024-01-01"},
    }  # fmt: skip
    assert read_yaml("x: &x {q: 1}\ny: *x")["y"] == {"q": 1}  # an alias is no bomb by itself
    with pytest.raises(yaml.YAMLError, match="there twice"):
        read_yaml("a: 1\na: 2")


def test_no_flip_of_a_manifests_bits_goes_unnoticed(tmp_path):
    manifest = {"step": 3, "files": {}, "best": {"value": 0.5}, "rng": [[1, 2], [3, 4]]}
    whole = sealed(manifest).encode()
    path = tmp_path / "manifest.json"
    rng = random.Random(26)
    for _ in range(300):
        torn = bytearray(whole)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        try:
            read = verified_manifest(tmp_path)
        except UNREADABLE:
            continue
        assert {key: read[key] for key in manifest} == manifest  # it only looks different
    path.write_text(sealed(manifest | {"files": {"../x": {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(ValueError, match="no file of the checkpoint's own"):
        verified_manifest(tmp_path)


def test_no_flip_in_the_token_cache_is_believed(config_file, tmp_path):
    config = load_config(["--config", str(config_file), "data.cache=false"])
    tokenizer = load_tokenizer(config.base)
    path = tmp_path / "tokens.safetensors"
    examples, report = load_examples(config, tokenizer, "train")
    write_cache(path, examples, report)
    assert len(read_cache(path)[0]) == len(examples)
    whole = path.read_bytes()
    rng = random.Random(26)
    for _ in range(100):
        torn = bytearray(whole)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        read = read_cache(path)
        same = read and all((a.input_ids == b.input_ids).all() for a, b in zip(read[0], examples))
        assert read is None or same


def test_torn_logs_and_reports_do_not_block_a_run(tmp_path):
    log = '{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra\n{"a": {}\n5\n{"x": 1}\n{"step": 3}\n'
    assert [line["step"] for line in whole_lines(log)] == [1, 3]
    (tmp_path / "report.json").write_text("")
    assert read_report(tmp_path) == {}
    assert write_report(tmp_path, {"steps": 1}) == {"steps": 1}


def test_the_lock_is_of_the_folder_that_has_the_name(tmp_path, monkeypatch):
    run = tmp_path / "run"
    earlier = lock_folder(run)
    locked: list = []
    waiter = threading.Thread(target=lambda: locked.append(lock_folder(run)), daemon=True)
    waiter.start()
    threading.Event().wait(0.5)  # it has opened the file and waits
    run.rename(tmp_path / "run.1")
    earlier.close()
    waiter.join(10)
    assert (run / ".lock").is_file()  # made anew, and locked: nobody else gets it
    monkeypatch.setenv("LOOP_GRACE_SECONDS", "0.1")
    with pytest.raises(TimeoutError):
        lock_folder(run)
    locked[0].close()
    Path(run / ".lock").unlink()
    (tmp_path / "victim").write_text("mine")
    (run / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        lock_folder(run)
    assert (tmp_path / "victim").read_text() == "mine"
