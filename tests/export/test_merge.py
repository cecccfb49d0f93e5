"""The merged model is the adapted one, in a folder that others load.

What can't be merged is refused before anything is written.
"""

import json
import os
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from helpers import CPU, PYTHON, ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loop.commands import merge as merge_command
from loop.config.schema import ConfigError
from loop.data.tokenization import PLAIN_TEMPLATE
from loop.export import compare
from loop.export import merge as merging
from loop.export.audit import AuditError
from loop.export.merge import merge
from loop.export.standalone_loss import loss_of
from loop.model.loading import load_base


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(5, 45)[None], use_cache=False).logits.float()


def tensors(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter_of(base: str, folder, **options) -> str:
    """A LoRA adapter for a base with random weights, without a run's trained.json."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options),
    )
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture
def here(trained, tiny_base, tmp_path):
    """Copies of the trained adapter and its base, to be spoilt: (adapter, base, where to write)."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    shutil.copytree(tiny_base, tmp_path / "base")
    return str(tmp_path / "adapter"), str(tmp_path / "base"), tmp_path / "out"


@pytest.mark.parametrize("into", merging.WAYS)
def test_merging_gives_base_plus_adapter(trained, tiny_base, tmp_path, into):
    if into == "16bit":
        command = [
            PYTHON,
            "-m",
            "loop.commands.merge",
            "--adapter",
            str(trained / "adapter"),
            "--out",
            str(tmp_path / "m"),
        ]
        env = os.environ | CPU
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "peak memory" in done.stdout, done.stderr
    else:
        merge(str(trained / "adapter"), str(tmp_path / "m"), into=into)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16))
    adapted = PeftModel.from_pretrained(
        load_base(tiny_base, torch.bfloat16, "cpu", quantization="nf4" if into == "nf4" else None),
        str(trained / "adapter"),
    )
    with adapted.disable_adapter():
        base = logits(adapted)
    ours, other = (merged - logits(adapted)).norm(), (merged - base).norm()
    assert ours < 0.1 * other  # bf16 rounding of W + BA, against what the adapter changes
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    assert not (tmp_path / "m" / "adapter_config.json").exists() and not list(
        tmp_path.glob(".writing*")
    )


@pytest.mark.parametrize("into", merging.WAYS)
def test_every_weight_is_the_rounded_sum(trained, tiny_base, tmp_path, into):
    """Bit for bit: what transformers loads or dequantises, plus B A scale, rounded once from fp32.

    The rest of the base is as it was.
    """
    merged = tensors(merge(str(trained / "adapter"), str(tmp_path / "m"), into=into))
    quantization = "nf4" if into == "nf4" else None
    model = load_base(tiny_base, torch.bfloat16, "cpu", quantization=quantization)
    base = (model.dequantize(dtype=torch.bfloat16) if into == "nf4" else model).state_dict()
    lora = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == tensors(tiny_base).keys()
    adapted = 0
    for name, tensor in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name]
        if f"{key}.lora_A.weight" in lora:
            product = lora[f"{key}.lora_B.weight"].float() @ lora[f"{key}.lora_A.weight"].float()
            delta = product * 2.0  # lora_alpha 16, r 8
            expected = (expected.float() + delta).bfloat16()
            adapted += 1
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected), name
    assert adapted == 7 * 3


def test_bases_and_merged_models_may_be_sharded(trained, tiny_base, tmp_path, monkeypatch):
    """The same tensors, whatever the files; and never more in memory than one of the new files."""
    whole = tensors(merge(str(trained / "adapter"), str(tmp_path / "whole")))
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(
        tmp_path / "base", max_shard_size="100KB"
    )
    for path in Path(tiny_base).glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "trained.json").unlink()  # it knows the base by its files
    sizes, saved = [], []
    save, merge_tensor = merging.save_file, merging.merge_tensor

    def save_file(tensors, *args, **options):
        saved.extend(weakref.ref(tensor) for tensor in tensors.values())
        sizes.append(sum(2 * tensor.numel() for tensor in tensors.values()))
        save(tensors, *args, **options)

    def merge_when_freed(*args):
        assert not any(tensor() is not None for tensor in saved)
        return merge_tensor(*args)

    monkeypatch.setattr(merging, "save_file", save_file)
    monkeypatch.setattr(merging, "merge_tensor", merge_when_freed)
    monkeypatch.setattr(merging, "FILE_BYTES", 1)
    out = merge(str(tmp_path / "adapter"), str(tmp_path / "m"), str(tmp_path / "base"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = sum(2 * t.numel() for t in whole.values())
    assert len(set(index["weight_map"].values())) == len(sizes) > 2
    assert max(sizes) <= total / 3 and index["metadata"]["total_size"] == total
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())
    sharded = tensors(out)
    assert sharded.keys() == whole.keys() == index["weight_map"].keys() and all(
        torch.equal(whole[n], t) for n, t in sharded.items()
    )
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out)),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")),
    )


def test_tied_embeddings_stay_tied(tiny_base, tmp_path):
    shape = LlamaConfig.from_pretrained(tiny_base)
    shape.tie_word_embeddings = True
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path / "tied")
    shutil.copy(Path(tiny_base) / "tokenizer.json", tmp_path / "tied")
    shutil.copy(Path(tiny_base) / "tokenizer_config.json", tmp_path / "tied")
    base = str(tmp_path / "tied")
    out = merge(
        adapter_of(base, tmp_path / "adapter", target_modules="all-linear"), str(tmp_path / "m")
    )
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert (
        merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        and "lm_head.weight" not in tensors(out)
    )
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
    )
    assert (logits(merged) - logits(adapted)).norm() < 0.05 * logits(adapted).norm()
    with pytest.raises(ConfigError, match="adapts lm_head.weight.* shares it with the embeddings"):
        merge(adapter_of(base, tmp_path / "head", target_modules=["lm_head"]), str(tmp_path / "n"))


def test_the_folder_is_what_servers_read(here):
    adapter, base, out = here
    rewrite(Path(base) / "config.json", dtype="float32", auto_map={"AutoConfig": "x.y"})
    (Path(base) / "LICENSE").write_text("theirs")
    (Path(base) / "chat_template.jinja").unlink()
    (Path(adapter) / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    (Path(adapter) / "trained.json").unlink()
    merge(adapter, str(out), base)
    config = json.loads((out / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForCausalLM"]
        and config["dtype"] == config["torch_dtype"] == "bfloat16"
    )
    assert not {"quantization_config", "auto_map", "_name_or_path"} & config.keys()
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
        "LICENSE",
    } <= {p.name for p in out.iterdir()}
    assert (
        AutoTokenizer.from_pretrained(out).chat_template == PLAIN_TEMPLATE
    )  # the base has none; the run used this one
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def drop_a_tensor(adapter, base):
    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, Path(adapter) / "adapter_model.safetensors")


def spoil_a_number(adapter, base):
    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    weights[sorted(weights)[0]][0, 0] = float("nan")
    save_file(weights, Path(adapter) / "adapter_model.safetensors")


def change_the_base(adapter, base):
    data = bytearray((Path(base) / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (Path(base) / "model.safetensors").write_bytes(data)


def of_another_shape(adapter, base):
    rewrite(Path(base) / "config.json", num_hidden_layers=2)


def names_a_shard_that_is_gone(adapter, base):
    (Path(base) / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00009.safetensors"}})
    )


@pytest.mark.parametrize(
    ("fault", "hashed", "words"),
    [
        (drop_a_tensor, True, "its hash differs"),
        (drop_a_tensor, False, "lora_A.weight is missing"),
        (spoil_a_number, False, "holds a value that is no number"),
        (change_the_base, True, "another content"),
        (of_another_shape, False, "does not fit|has no place"),
        (names_a_shard_that_is_gone, False, "lacks 'model-00009.safetensors'"),
        (
            lambda a, b: rewrite(
                Path(b) / "config.json", quantization_config={"quant_method": "gptq"}
            ),
            False,
            "stored quantised .gptq.",
        ),
        (
            lambda a, b: (Path(b) / "model.safetensors").rename(Path(b) / "pytorch_model.bin"),
            False,
            "only safetensors are read",
        ),
        (
            lambda a, b: rewrite(Path(a) / "adapter_config.json", bias="all"),
            False,
            "bias=all changes more",
        ),
        (
            lambda a, b: rewrite(Path(a) / "adapter_config.json", modules_to_save=["lm_head"]),
            False,
            "modules_to_save=",
        ),
        (
            lambda a, b: rewrite(Path(a) / "adapter_config.json", use_dora=True),
            False,
            "use_dora=True changes more",
        ),
        (
            lambda a, b: rewrite(Path(a) / "adapter_config.json", trainable_token_indices=[3]),
            False,
            "trainable_token_indices=",
        ),
        (lambda a, b: (Path(a) / "adapter_config.json").unlink(), False, "no adapter_config.json"),
        (
            lambda a, b: save_file(
                {n: t.to(torch.int8) for n, t in tensors(b).items()}, Path(b) / "model.safetensors"
            ),
            False,
            "stored as codes",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(here, fault, hashed, words):
    adapter, base, out = here
    if not hashed:
        (Path(adapter) / "trained.json").unlink()
    fault(adapter, base)
    with pytest.raises((ConfigError, AuditError), match=words):
        merge(adapter, str(out), base)
    assert not out.exists() and not list(out.parent.glob(".writing*"))


def test_of_the_bases_files_neither_index_nor_provenance_is_copied(tmp_path):
    names = (merging.INDEX, merging.TRAINED, "tokenizer.json", "LICENSE.txt", "model.safetensors")
    for folder in ("base", "out"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / "base" / name).write_text("x")
    merging.copy_other_files(merging.StoredBase("x", tmp_path / "base", {}, {}), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.json", "LICENSE.txt"}


def test_the_configuration_is_the_bases_own_in_bf16_and_with_a_cache(tmp_path):
    own = {"use_cache": False, "dtype": "float32", "auto_map": {"x": "y"}, "hidden_size": 64}
    merging.write_config(merging.StoredBase("x", tmp_path, own, {}), "LlamaForCausalLM", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_size": 64,
        "architectures": ["LlamaForCausalLM"],
    }


def test_nothing_is_overwritten_and_nothing_half_is_left(here, monkeypatch):
    adapter, base, out = here
    out.mkdir()
    (out / "x").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge(adapter, str(out), base)
    (out / "x").unlink()
    monkeypatch.setattr(
        merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.raises(ConfigError, match="0.0 GB are free"):
        merge(adapter, str(out), base)
    monkeypatch.undo()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "save_file", interrupted)
    with pytest.raises(SystemExit, match="stopped; nothing is left"):
        merge_command.main(["--adapter", adapter, "--base", base, "--out", str(out)])
    assert not list(out.iterdir()) and not list(out.parent.glob(".writing*"))


def row(loss: float, same: int = 0) -> dict:
    return {"loss": loss, "same": same}


@pytest.mark.parametrize(
    ("adapter", "sixteen", "nf4", "says"),
    [
        (1.0, row(0.9), row(1.0), "ship 16bit"),
        (1.0, row(1.0), row(0.9), "ship nf4"),
        (1.0, row(1.001, 3), row(1.0, 9), "ship nf4"),
        (1.0, row(1.001, 9), row(1.0, 3), "ship 16bit"),
        (1.0, row(1.0, 3), row(1.0, 3), "ship nf4"),
        (1.0, row(1.2), row(1.1), "ship the adapter"),
        (1.0, row(1.2, 9), row(1.005), "ship nf4"),
    ],
)
def test_the_recommendation(adapter, sixteen, nf4, says):
    assert compare.recommend(
        {compare.ADAPTER: row(adapter, 9), "16bit": sixteen, "nf4": nf4}
    ).startswith(says)


def test_the_three_ways_are_measured(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        compare,
        "standalone_loss",
        lambda folder, examples, device, timeout: loss_of(
            str(folder), device, [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
        ),
    )
    argv = ["--adapter", str(trained / "adapter"), "--out", str(tmp_path / "both"), "--notes", "2"]
    merge_command.main([*argv, "--report", str(trained / "config.yaml")])
    said, report = (
        capsys.readouterr().out,
        json.loads((tmp_path / "both" / "report.json").read_text()),
    )
    audited = json.loads((trained / "report.json").read_text())["audit"]["fresh"]
    ways = report["ways"]
    assert (
        ways[compare.ADAPTER]["loss"] == pytest.approx(audited, rel=1e-6)
        and ways[compare.ADAPTER]["same"] == 2
    )
    assert (
        ways["nf4"]["loss"] == pytest.approx(audited, rel=5e-3)
        and ways["nf4"]["loss"] != ways["16bit"]["loss"]
    )
    assert report["verdict"] in said and all(way in said for way in ways)
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"16bit", "nf4", "report.json"}
    with pytest.raises(SystemExit):
        merge_command.main(
            [*argv[:2], "--out", str(tmp_path / "more"), "--report", str(tmp_path / "nowhere.yaml")]
        )
    assert "nowhere.yaml" in capsys.readouterr().err and not (tmp_path / "more").exists()
