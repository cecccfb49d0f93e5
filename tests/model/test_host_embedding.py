"""A frozen embedding in the CPU's memory gives the same model, and is refused where it can't be."""

import json

import pytest
import torch
from helpers import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from loop.config.deepspeed import build_ds_config
from loop.config.schema import Config, ConfigError
from loop.memory.estimate import count_weights, frozen_sizes
from loop.model import host_embedding, loading
from loop.model.loading import load_base, load_model, load_model_config

EMBEDDED = ROOT / "loop" / "embedded" / "base"


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    said = json.loads((EMBEDDED / "config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(**said | {"tie_word_embeddings": False, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_config(base: str, **changes) -> Config:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return Config(base=base, data={"train": "x"}, **{"lora": lora, **changes})


def test_the_same_logits_without_the_weight_among_the_parameters(untied, monkeypatch):
    monkeypatch.setattr(loading.dist, "get_world_size", lambda: 1)
    ids = torch.randint(0, 2048, (1, 30))
    seen = {}
    for on_cpu in (False, True):
        config = make_config(untied, embedding_on_cpu=on_cpu)
        torch.manual_seed(1)
        model = load_model(config, build_ds_config(config), "cpu", "sdpa")
        inputs = {
            "input_ids": ids,
            "position_ids": torch.arange(30)[None],
            "cu_seqlens": torch.tensor([0, 12, 30], dtype=torch.int32),
            "max_seqlen": 30,
        }
        logits = model(**inputs).logits
        logits.float().square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert gradients and all(g is not None for g in gradients)
        seen[on_cpu] = logits, gradients, [name for name, _ in model.named_parameters()]
    assert torch.equal(seen[False][0], seen[True][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[False][1], seen[True][1], strict=True))
    (absent,) = set(seen[False][2]) - set(seen[True][2])
    assert absent.endswith("embed_tokens.weight")


def test_the_estimate_leaves_it_out(untied):
    model_config = load_model_config(untied)
    plain, on_cpu = (make_config(untied, embedding_on_cpu=value) for value in (False, True))
    counts = count_weights(plain, model_config)
    assert counts.embedding == 2048 * 256
    less = sum(frozen_sizes(plain, counts)) - sum(frozen_sizes(on_cpu, counts))
    assert less == counts.embedding


def test_where_it_can_not_be_is_one_line(untied, monkeypatch):
    for base, changes, says in (
        (str(EMBEDDED), {}, "its output layer as well"),
        (untied, {"method": "full"}, "method=full trains"),
    ):
        model = load_base(base, torch.float32, "cpu", quantization=None)
        with pytest.raises(ConfigError, match=f"embedding_on_cpu=true.*{says}"):
            host_embedding.keep_embedding_on_cpu(model, make_config(base, **changes), "cpu")
    monkeypatch.setattr(host_embedding.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(host_embedding.dist, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="it is for one rank"):
        host_embedding.keep_embedding_on_cpu(model, make_config(untied), "cpu")
