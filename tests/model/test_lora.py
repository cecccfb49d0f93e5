"""A run that trains on from an adapter: what fits, its weights as the start, and the chain."""

import json
import shutil

import pytest
import torch
from helpers import run_ok
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loop.checkpoint.identity import base_fingerprint
from loop.config.cli import load_config
from loop.config.schema import ConfigError
from loop.distributed.files import sha256
from loop.model.loading import add_lora, load_base
from loop.model.lora import (
    WEIGHTS,
    attach_adapter,
    check_start,
    describe_start,
    load_start,
    read_adapter,
    trained_quantization,
)


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of a run's adapter, to be spoilt."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def lora(trained):
    return load_config(["--config", str(trained / "config.yaml")]).lora


def rewrite(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_that_does_not_fit_is_one_line(adapter, lora, tiny_base):
    own = base_fingerprint(tiny_base)
    digest = check_start(str(adapter), lora, own)
    assert digest == json.loads((adapter / "trained.json").read_text())["sha256"]
    assert check_start(str(adapter), lora | {"lora_dropout": 0.3}, own) == digest
    for change, words in (
        ({"r": 4}, "has lora.r=8, and this run 4; set lora.r=8"),
        ({"lora_alpha": 1}, "has lora.lora_alpha=16, and this run 1"),
        ({"use_rslora": True}, "has lora.use_rslora=False"),
        ({"target_modules": ["q_proj"]}, "has lora.target_modules=.*down_proj"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_start(str(adapter), lora | change, own)
    with pytest.raises(ConfigError, match=f"was trained on another base, {tiny_base}"):
        check_start(str(adapter), lora, "0" * 16)
    for name, changes, words in (
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type='IA3'; only LoRA"),
        ("trained.json", {"sha256": "0"}, "is not the file that its run wrote; copy it again"),
        ("trained.json", {"base_fingerprint": "0"}, "was trained on another base"),
    ):
        before = (adapter / name).read_text()
        rewrite(adapter / name, **changes)
        with pytest.raises(ConfigError, match=words) as error:
            check_start(str(adapter), lora, own)
        assert str(error.value).startswith(f"adapter={adapter}: ")
        (adapter / name).write_text(before)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=f"adapter={adapter}: no {WEIGHTS} there"):
        check_start(str(adapter), lora, own)


def test_one_weight_that_is_no_number_is_enough(adapter, tiny_base):
    weights = load_file(adapter / WEIGHTS)
    name = sorted(weights)[3]
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / WEIGHTS, {"format": "pt"})
    rewrite(adapter / "trained.json", sha256=sha256(adapter / WEIGHTS))
    with pytest.raises(ConfigError, match="its weights are no finite numbers"):
        attach_adapter(load_base(tiny_base, torch.bfloat16, "cpu"), str(adapter))


@pytest.mark.parametrize("rank", [0, -1, 2**20, "8", True])
def test_a_rank_that_peft_can_not_have_is_named(adapter, rank):
    rewrite(adapter / "adapter_config.json", r=rank)
    with pytest.raises(ConfigError, match=f"r={rank}: must lie between 1 and"):
        read_adapter(str(adapter))


def test_what_an_adapter_from_elsewhere_does_not_tell(adapter, tiny_base):
    """It counts as trained on this base in NF4, as the seed configuration stores it."""
    (adapter / "trained.json").unlink()
    trained = read_adapter(str(adapter))
    assert trained == {
        "base": tiny_base,
        "revision": None,
        "method": "qlora",
        "double_quant": True,
        "dtype": "bfloat16",
    }
    assert trained_quantization(trained) == "nf4"
    assert trained_quantization(trained | {"method": "lora"}) is None
    assert trained_quantization(trained | {"storage": None}) is None


def test_its_weights_are_the_start_and_all_of_them(adapter, lora, tiny_base):
    def build(**changes):
        torch.manual_seed(1)
        base = load_base(tiny_base, torch.bfloat16, "cpu")
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora | changes))

    model = build()
    load_start(model, str(adapter))
    weights = load_file(adapter / WEIGHTS)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = weights.pop(name.replace(".default", ""))
            assert torch.equal(parameter, kept.to(parameter.dtype))
    assert not weights
    with pytest.raises(ConfigError, match="that of this run None; set lora.target_modules"):
        load_start(build(target_modules=["q_proj"]), str(adapter))
    weights = load_file(adapter / WEIGHTS)
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(ConfigError, match="has the shape None"):
        load_start(model, str(adapter))


def test_new_lora_has_the_runs_fields(trained, tiny_base):
    fields = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "target_modules": ["q_proj"]}
    config = load_config(["--config", str(trained / "config.yaml"), f"lora={json.dumps(fields)}"])
    model = add_lora(load_base(tiny_base, torch.bfloat16, "cpu"), config, None)
    made = model.peft_config["default"]
    assert (made.r, made.lora_alpha, made.lora_dropout) == (3, 5, 0.25)
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained_names and all(".q_proj.lora_" in name for name in trained_names)


def test_the_chain_is_told_newest_first(adapter):
    trained = json.loads((adapter / "trained.json").read_text())
    rewrite(adapter / "trained.json", started_from=[{"sha256": "0ld", "steps": 3}])
    newest, oldest = describe_start(str(adapter))
    assert newest["sha256"] == trained["sha256"] and newest["steps"] == trained["steps"] == 6
    assert newest["data"] == trained["data"]["train"]["fingerprint"]
    assert oldest == {"sha256": "0ld", "steps": 3}


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_and_is_resumed(trained, tmp_path):
    """On two ranks: its first loss is the last one of the run before; the third tells both."""

    def run(name: str, start, *options: str) -> str:
        command = ["-m", "loop.train", "--config", str(trained / "config.yaml")]
        place = [f"run.dir={tmp_path}", f"run.name={name}", f"adapter={start}"]
        return run_ok(2, *command, *place, "run.export_check_examples=0", *options)

    def losses(folder) -> list[dict]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    first = trained / "adapter"
    out = run("second", first, "max_steps=2", "run.save_steps=1", "lr=1e-3")
    assert f"on from {first}" in out
    before = json.loads((trained / "report.json").read_text())["eval/loss"]
    after = losses(tmp_path / "second")[0]
    assert after["step"] == 0 and after["eval/loss"] == pytest.approx(before, rel=2e-3)
    # The same run over three steps is resumed, and one from new weights or another start is not.
    run("second", first, "max_steps=3", "run.save_steps=1", "lr=1e-3")
    assert losses(tmp_path / "second")[-1]["step"] == 3
    with pytest.raises(AssertionError, match="adapter was .* and is None"):
        run("second", "null", "max_steps=4")
    with pytest.raises(AssertionError, match="adapter was .* and is "):
        run("second", tmp_path / "second" / "adapter", "max_steps=4")
    run("third", tmp_path / "second" / "adapter", "max_steps=1")
    says = json.loads((tmp_path / "third" / "adapter" / "trained.json").read_text())
    assert [start["steps"] for start in says["started_from"]] == [3, 6]
    card = (tmp_path / "third" / "adapter" / "README.md").read_text()
    assert "trained on from, 1" in card and says["started_from"][1]["sha256"][:16] in card


LONG = "x" * 10_000
WRONG = {
    "steps": ("x", [], {}, -1, 1.5, True, float("inf"), 2**64),
    "started_from": (
        "x",
        {},
        5,
        [5],
        [{"steps": "x"}],
        [{"steps": -1}],
        [{"sha256": []}],
        [{"sha256": LONG}],
        [{}] * 1001,
    ),
    "prompt": ("x", 5, []),
    "generation": ("x", 5, [], {"max_new_tokens": "x"}, {"nothing": 1}),
    "base_fingerprint": (5, [], {}, True, LONG),
    "sha256": (5, [], {}, LONG),
    "storage": (5, [], LONG),
    "data": (5, [], {"train": 5}),
    "double_quant": (None, 0, "x", [], {}),
    "base": (None, 0, [], {}, LONG),
    "max_seq_len": ("x", [], -1, float("inf")),
    "figures": (5, "x", []),
}


def test_what_no_run_writes_into_trained_json_is_refused_by_its_key(adapter):
    read_adapter(str(adapter))
    before = (adapter / "trained.json").read_text()
    for key, values in WRONG.items():
        for value in values:
            rewrite(adapter / "trained.json", **{key: value})
            with pytest.raises(ConfigError, match=f"trained.json: {key}") as error:
                read_adapter(str(adapter))
            assert len(str(error.value).replace(str(adapter), "")) < 300
            (adapter / "trained.json").write_text(before)
    rewrite(adapter / "trained.json", **{key: None for key in ("steps", "started_from", "prompt")})
    read_adapter(str(adapter))


@pytest.mark.parametrize("name", ["trained.json", "adapter_config.json"])
def test_a_huge_description_is_not_read(adapter, name):
    rewrite(adapter / name, started_from=[{"sha256": "x" * 5_000_000}])
    with pytest.raises(ConfigError, match=f"{name} has more than 4,194,304 bytes"):
        read_adapter(str(adapter))


@pytest.mark.parametrize(
    ("key", "value"),
    [("arrow_config", 0), ("arrow_config", {"a": 5}), ("alora_invocation_tokens", "x")],
)
def test_a_variant_of_lora_that_peft_can_not_read_is_one_line(adapter, key, value):
    rewrite(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(ConfigError, match="adapter_config.json: ") as error:
        read_adapter(str(adapter))
    assert "\n" not in str(error.value)
