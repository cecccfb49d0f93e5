"""Hostile input through the real commands: one line, nothing written elsewhere, no code run."""

import json
import random
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from harness import run_watched
from helpers import ROOT
from hostile_bases import corpus, make
from hostile_files import WEIGHTS, adapters, rows, runs
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loop.checkpoint.run_dir import lock_folder, read_report, whole_lines, write_report
from loop.checkpoint.store import UNREADABLE, sealed, verified_manifest
from loop.config.cli import load_config
from loop.config.deepspeed import build_ds_config
from loop.config.plain_yaml import read_yaml
from loop.config.schema import Config, ConfigError
from loop.data.cache import read_cache, write_cache
from loop.data.dataset import load_examples
from loop.data.sources.locations import locate, sources_of
from loop.distributed.files import sha256
from loop.model.loading import load_tokenizer

EMBEDDED = str(ROOT / "loop/configs/embedded.yaml")
BASES, ADAPTERS, ROWS, RUNS = dict(corpus()), dict(adapters()), dict(rows()), dict(runs())
DIALOGUE = ["--dialogue", str(ROOT / "tests" / "dialogue.txt"), "--max-new-tokens", "1"]
QUICK_BASES = (
    "template eats memory", "config gptq", "config num_hidden_layers=10000000",
    "code in config.json, unknown kind", "code in tokenizer_config.json", "index of .bin",
    "an adapter in it",
)  # fmt: skip
QUICK_ADAPTERS = (
    "a pickle", "weights bit 3", "NaN", "a missing tensor", "adapter_config.json r=1000000000",
    "adapter_config.json base_model_name_or_path=../../../etc",
)  # fmt: skip
QUICK_ROWS = ("id='\\ud800'", "dialogue='a\\udfffb'", "deep, after rows")
ALIASES = "[" + ", ".join(["*a"] * 20) + "]"
BOMB = "{a: &a [1, 1], " + "b: &a " + ALIASES + ", c: &a " + ALIASES + ", d: &a " + ALIASES + "}"
OVERRIDES = (
    "lr=2024-13-45", "lr=!!int abc", "lr=" + "9" * 5000, "lr=.inf", "lora={on: 1}", "lora={~: 1}",
    "lora={1: 1}", "lora=&a [*a]", "lora={r: 1, r: 2}", f"lora={BOMB}", "lora.lora_dropout=null",
    "lora.rank_pattern={'(': 1}", "lora.layers_to_transform=x", "lora.task_type=X",
    "lora.r=1000000000", "lora.megatron_core=os", "batch_size=1e12", "batch_size=1000000000000",
    "epochs=1000000000", "run.name=../../x", "run.name=a/../../b", "\x1b[31mlr=1",
    "lr=1:30", "max_steps=0100", "data.train=[[a]]", "betas=5", "seed=" + "9" * 400,
    "--config=", "--config=/dev/zero", "max_seq_len=1e99", "deepspeed=/dev/zero",
    "data.train=/dev/zero",
)  # fmt: skip
SECTIONS = (
    {"zero_optimization": 5}, {"zero_optimization": {"stage": 3, "offload_optimizer": True}},
    {"fp16": []}, {"bf61": {"enabled": True}}, {"timers": 3}, {"steps_per_print": "x"},
    {"zero_optimization": {"stage": 3, "reduce_bucket_size": "x"}}, {"bf16": {"enabled": "x"}},
    {"zero_optimization": {"stage": 3, "offload_param": 5}}, {"communication_data_type": 5},
)  # fmt: skip


def code_ran(folder: Path) -> list[str]:
    return ["code of the input ran"] if any(folder.rglob("CODE_RAN")) else []


def mistakes_with_base(folder: Path, tiny_base: str, name: str) -> list[str]:
    """What `generate` does wrong with a base of the corpus; "y" is typed at whatever asks."""
    base = make(tiny_base, BASES[name], folder / "base")
    outcome = run_watched(
        folder / "here", "generate", "--base", str(base), *DIALOGUE, typed="y\n" * 20
    )
    return outcome.mistakes() + code_ran(folder)


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> str:
    """An adapter of the tiny base, with the hash of its weights."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    model.save_pretrained(folder)
    trained = {"base": tiny_base, "sha256": sha256(folder / WEIGHTS)}
    (folder / "trained.json").write_text(json.dumps(trained))
    return str(folder)


def mistakes_with_adapter(folder: Path, adapter: str, name: str, command: str) -> list[str]:
    """What `generate` or `merge` does wrong with an adapter of the corpus."""
    changed = make(adapter, ADAPTERS[name], folder / "adapter")
    more = DIALOGUE if command == "generate" else ["--out", str(folder / "here" / "merged")]
    outcome = run_watched(
        folder / "here", command, "--adapter", str(changed), *more, typed="y\n" * 20
    )
    return outcome.mistakes() + code_ran(folder)


def mistakes_with_rows(folder: Path, config_file: Path, name: str) -> list[str]:
    """What `plan` does wrong with a file of rows of the corpus."""
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(ROWS[name])
    train = f"data.train={folder / 'rows.jsonl'}"
    more = [train, "data.valid=null", "data.cache=false", f"run.dir={folder / 'here'}"]
    outcome = run_watched(folder / "here", "plan", "--config", str(config_file), *more)
    return outcome.mistakes() + code_ran(folder)


@pytest.fixture(scope="module")
def run_folder(tiny_base, tmp_path_factory) -> Path:
    """A configuration beside the folder of its finished run of four steps. ORDINARY holds what that
    did: programs that DeepSpeed and the loop start.
    """
    folder = tmp_path_factory.mktemp("whole")
    rows = "".join(
        json.dumps({"id": str(i), "dialogue": f"Doctor: {i}?", "soap": "S: a\nP: b"}) + "\n"
        for i in range(12)
    )
    (folder / "rows.jsonl").write_text(rows)
    config = {
        "base": tiny_base,
        "data": {"train": str(folder / "rows.jsonl"), "cache": False},
        "max_seq_len": 1024,
        "batch_size": 1,
        "epochs": 4,
        "max_steps": 4,
        "monitor": {"sample_notes": []},
        "run": {"dir": str(folder / "runs"), "name": "x", "save_steps": 1, "keep_checkpoints": 3},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    outcome = run_watched(folder, "train", "--config", str(folder / "config.yaml"))
    assert outcome.code == 0, outcome.err[-2000:]
    assert not any(event.startswith("open") for event in outcome.events), outcome.events
    (folder / "ORDINARY").write_text("\n".join(outcome.events))
    return folder


def mistakes_with_run(folder: Path, run_folder: Path, name: str) -> list[str]:
    """What `train` does wrong where it resumes a run of the corpus, for two more steps."""
    shutil.copytree(run_folder / "runs", folder / "runs", symlinks=True)
    RUNS[name](folder / "runs" / "x")
    more = [f"run.dir={folder / 'runs'}", "max_steps=6"]
    outcome = run_watched(folder, "train", "--config", str(run_folder / "config.yaml"), *more)
    found = outcome.mistakes(ordinary=tuple((run_folder / "ORDINARY").read_text().splitlines()))
    victim = folder / "runs" / "victim"
    if victim.exists() and victim.read_text() != "mine":
        found.append("a file outside was changed")
    return found + code_ran(folder)


def test_hostile_input_ends_in_one_line(tiny_base, adapter, config_file, tmp_path):
    found = {}
    for number, name in enumerate((*QUICK_BASES, *QUICK_ADAPTERS, *QUICK_ROWS)):
        folder = tmp_path / str(number)
        if name in QUICK_BASES:
            found[name] = mistakes_with_base(folder, tiny_base, name)
        elif name in QUICK_ADAPTERS:
            found[name] = mistakes_with_adapter(folder, adapter, name, "generate")
        else:
            found[name] = mistakes_with_rows(folder, config_file, name)
    assert {name: mistakes for name, mistakes in found.items() if mistakes} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_every_hostile_base_ends_in_one_line(tiny_base, tmp_path, name):
    assert mistakes_with_base(tmp_path, tiny_base, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "merge"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_hostile_adapter_ends_in_one_line(adapter, tmp_path, name, command):
    assert mistakes_with_adapter(tmp_path, adapter, name, command) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_hostile_row_ends_in_one_line(config_file, tmp_path, name):
    assert mistakes_with_rows(tmp_path / "rows", config_file, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_hostile_run_ends_in_one_line(run_folder, tmp_path, name):
    assert mistakes_with_run(tmp_path, run_folder, name) == []


@pytest.mark.slow
def test_configuration_bombs_end_a_command_in_one_line(config_file, tmp_path):
    for override in OVERRIDES:
        outcome = run_watched(tmp_path, "plan", "--config", str(config_file), override)
        assert (override, outcome.mistakes((2,))) == (override, [])


def test_configuration_bombs_are_refused(config_file, tmp_path):
    for override in OVERRIDES:
        with pytest.raises(ConfigError):
            config = load_config(["--config", str(config_file), override])
            build_ds_config(config)
            locate(sources_of(config.data, "train")[0], "train")
    for change in SECTIONS:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(json.loads((ROOT / "ds_config.json").read_text()) | change))
        with pytest.raises(ConfigError) as refused:
            build_ds_config(load_config(["--config", str(config_file), f"deepspeed={path}"]))
        assert next(iter(change)).split(".")[0] in str(refused.value)


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
    merged = read_yaml("a: &a {p: 1, q: 2}\nb: &b {<<: *a, q: 3}\nc: {<<: [*b, *a], r: 4}")
    assert merged["b"] == {"p": 1, "q": 3} and merged["c"] == {"p": 1, "q": 3, "r": 4}
    for text in ("a: {<<: x}", "a: {<<: [x]}", "a: &a {p: 1}\nb: {<<: *a, q: 1, q: 2}"):
        with pytest.raises(yaml.YAMLError):
            read_yaml(text)
    with pytest.raises(yaml.YAMLError, match="there twice"):
        read_yaml("a: 1\na: 2")
    assert read_yaml("[0, 10, 0.5, -3, '010', '1:30', a:b]") == [
        0,
        10,
        0.5,
        -3,
        "010",
        "1:30",
        "a:b",
    ]
    for number in ("010", "1:30", "-1:30.5", "12:30:00"):  # 8, 90, ... to YAML 1.1
        with pytest.raises(yaml.YAMLError, match="plain digits"):
            read_yaml(f"a: {number}")


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
    log += '{"step": 4, "train/grad_norm": "x"}\n{"step": 5, "eval/loss": null}\n'
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
