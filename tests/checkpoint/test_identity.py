"""Which runs are the same one."""

import ast
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from transformers import AutoTokenizer

from loop.checkpoint.identity import (
    RunIdentity,
    base_fingerprint,
    examples_fingerprint,
    tokenizer_fingerprint,
)
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.data.batch_plan import plan_batches
from loop.data.tokenization import Example
from loop.model.loading import load_base

LENGTHS = np.arange(10, 50)


@pytest.fixture
def this(config_file, tiny_base):
    """(identity, plan) of a run with the options given."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def run(*options: str, examples=None, template: str | None = None):
        config = load_config(
            ["--config", str(config_file), "max_seq_len=64", "batch_size=2", *options]
        )
        ours = examples or [Example(f"e{n}", np.arange(n), np.arange(n)) for n in LENGTHS]
        plan = plan_batches(
            [len(e) for e in ours],
            config.tokens_per_step,
            config.seed,
            config.epochs,
            config.max_steps,
        )
        tokenizer.chat_template = template or tokenizer.chat_template
        return RunIdentity.of(config, tokenizer, ours, plan), plan

    return run


def test_another_dtype_is_told_as_a_changed_setting(this):
    identity, plan = this()
    narrow = dataclasses.replace(identity, settings=identity.settings | {"dtype": "float32"})
    notes = compare((identity, plan), (narrow, plan))
    assert notes == ["changed     dtype was 'bfloat16' and is 'float32' from step 4 on"]


def manifest_of(saved: tuple, step: int) -> dict:
    """What a checkpoint's manifest holds of a run (identity, plan), as it is read again."""
    identity, plan = saved
    return json.loads(json.dumps({"step": step, "identity": identity.at_step(plan, step)}))


def compare(saved: tuple, now: tuple, step: int = 3, force: bool = False) -> list[str]:
    identity, plan = now
    return identity.check_compatible(Path("step-000003"), manifest_of(saved, step), plan, force)


def test_where_and_how_a_run_computes_does_not_matter(this):
    how = [
        "micro_batch_size=1",
        "attention=sdpa",
        "gradient_checkpointing=true",
        "run.name=x",
        "run.save_steps=1",
        "monitor.eval_steps=1",
    ]
    assert compare(this(), this(*how)) == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("method=lora", "method was 'qlora' and is 'lora'"),
        ("double_quant=false", "double_quant was True and is False"),
        ("lora.r=4", "lora.r was 8 and is 4"),
        ("lora.target_modules=[q_proj]", "lora.target_modules was 'all-linear'"),
    ],
)
def test_another_model_is_refused_whatever_is_said(this, option, words):
    with pytest.raises(ConfigError, match="run.resume=false") as error:
        compare(this(), this(option), force=True)
    assert words in str(error.value) and "force" not in str(error.value)


def test_another_adapter_to_start_from_is_refused(this, trained):
    """The run before it is one from new weights."""
    with pytest.raises(ConfigError, match="adapter was None and is '[0-9a-f]{16}' now"):
        compare(this(), this(f"adapter={trained / 'adapter'}"), force=True)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("seed=7", "seed was 42 and is 7"),
        ("batch_size=3", "batch_size was 2 and is 3"),
        ("max_seq_len=100", "max_seq_len was 64 and is 100"),
    ],
)
def test_another_plan_is_refused_unless_forced(this, option, words):
    with pytest.raises(ConfigError, match="run.resume=force") as error:
        compare(this(), this(option))
    assert words in str(error.value)
    assert any(words in remark for remark in compare(this(), this(option), force=True))


def test_ranks_of_other_code_or_settings_do_not_start_together(this, monkeypatch):
    told: list[dict] = []

    def join(identity) -> None:
        ranks = SimpleNamespace(all_gather_json=lambda mine: [*told, mine])
        identity.check_equal_on_all_ranks(ranks)

    own = this()[0]
    own.check_equal_on_all_ranks(
        SimpleNamespace(all_gather_json=lambda mine: told.append(mine) or told)
    )
    join(own)
    join(dataclasses.replace(own, versions=own.versions | {"device": "another"}))
    with pytest.raises(ConfigError, match="rank 1 has another lr than rank 0: 0.5, not 0.001"):
        join(this("lr=0.5")[0])
    monkeypatch.setattr("loop.checkpoint.identity.source_digest", lambda package: 64 * "0")
    with pytest.raises(ConfigError, match="rank 1 has another code of loop/ than rank 0"):
        join(own)


def test_other_data_and_another_tokenizer_are_told_apart(this):
    other = [Example(f"e{n}", np.arange(n) + 1, np.arange(n)) for n in LENGTHS]
    with pytest.raises(ConfigError, match="examples was"):
        compare(this(), this(examples=other))
    with pytest.raises(ConfigError, match="tokenizer was"):
        compare(this(), this(examples=other, template="{{ messages }}"))


def test_settings_may_change_and_are_said(this):
    remarks = compare(this(), this("lr=5e-4", "lora.lora_dropout=0.0", "epochs=2"))
    said = [
        remark.removeprefix("changed     ").split(" from step")[0]
        for remark in remarks
        if "steps" not in remark
    ]
    assert said == [
        "epochs was 1 and is 2",
        "lr was 0.001 and is 0.0005",
        "lora.lora_dropout was 0.1 and is 0.0",
    ]
    with pytest.raises(ConfigError, match="made 3 steps already, and is to have 2"):
        compare(this(), this("max_steps=2"))


def test_the_order_up_to_the_step_counts_and_nothing_behind_it(this):
    saved, (now, plan) = this(), this()
    plan.order[plan.offsets[3] :] = plan.order[plan.offsets[3] :][::-1].copy()
    assert compare(saved, (now, plan)) == []
    plan.order[:2] = plan.order[:2][::-1].copy()
    with pytest.raises(ConfigError, match="order of the examples was"):
        compare(saved, (now, plan))


def test_a_base_is_its_content_not_its_name(tiny_base, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_base, moved)
    assert base_fingerprint(tiny_base) == base_fingerprint(str(moved))
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert base_fingerprint(tiny_base) != base_fingerprint(str(moved))


def test_a_tokenizer_is_its_vocabulary_specials_and_template(tiny_base):
    one, two = (AutoTokenizer.from_pretrained(tiny_base) for _ in range(2))
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
    two.add_tokens(["mg"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)


def test_nothing_is_pickled_and_no_code_of_a_model_is_run():
    """Read from the syntax tree, so that the docstrings may speak of it. Objects that travel
    between ranks are JSON (`Ranks.gather`).
    """
    forbidden = {
        "torch.load",
        "torch.save",
        "np.load",
        "np.save",
        "yaml.load",
        "pickle",
        "dill",
        "joblib",
        "shelve",
        "marshal",
        "cloudpickle",
    }
    for path in [*ROOT.glob("loop/**/*.py"), *ROOT.glob("kernels_check/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                used = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            elif isinstance(node, ast.Attribute):
                # all_gather_object and its like; construct_object is YAML's.
                sent = node.attr.endswith(("_object", "_object_list"))
                used = {ast.unparse(node)}
                if sent and node.attr != "construct_object":
                    used |= {"pickle"}
            elif isinstance(node, ast.keyword) and ast.unparse(node.value) != "False":
                used = {"trust_remote_code"} & {node.arg}
            else:
                used = set()
            assert not used & (forbidden | {"trust_remote_code"}), (
                f"{path.name}:{getattr(node, 'lineno', '')}"
            )


def test_a_base_that_is_only_a_pickle_is_refused(config_file, tiny_base, tmp_path):
    moved = tmp_path / "pickled"
    shutil.copytree(tiny_base, moved)
    (moved / "model.safetensors").rename(moved / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_base(str(moved), torch.float32, "cpu", quantization=None)


def test_a_checkpoint_of_another_version_is_refused_in_one_line(this):
    now, plan = this()
    with pytest.raises(ConfigError, match="another version of this loop"):
        manifest = {"step": 3, "identity": {"base": "x", "seed": 1}}
        now.check_compatible(Path("step-000003"), manifest, plan, False)


def test_a_base_of_the_hub_is_hashed_with_its_weights_from_the_first_run_on(tiny_base, monkeypatch):
    """Before them, the hash would be of config.json alone, and the same run another one as soon as
    they are there.
    """
    fetched = []
    monkeypatch.setattr(
        "loop.model.streaming.snapshot_download",
        lambda place, revision, allow_patterns: fetched.append((place, revision)) or tiny_base,
    )
    assert base_fingerprint("owner/name", "v1") == base_fingerprint(tiny_base) and fetched == [
        ("owner/name", "v1")
    ]


def test_every_part_of_an_example_is_hashed():
    """Its id, its tokens, and which of them are supervised."""
    ids = np.arange(8, dtype=np.int32)
    masked = np.where(ids < 4, -100, ids).astype(np.int32)
    examples = [
        Example("a", ids, ids),
        Example("b", ids, ids),
        Example("a", ids + 1, ids),
        Example("a", ids, masked),
    ]
    assert len({examples_fingerprint([example]) for example in examples}) == 4


def test_special_tokens_are_part_of_a_tokenizer(tiny_base):
    one, two = (AutoTokenizer.from_pretrained(tiny_base) for _ in range(2))
    two.eos_token = "<pad>"  # the same vocabulary and template, another end
    assert one.get_vocab() == two.get_vocab() and one.chat_template == two.chat_template
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)
