"""The table of cards in loop/memory/README.md is what the estimate says; nothing larger fits."""

import re

import pytest
from helpers import ROOT
from transformers import LlamaConfig

from loop.config.deepspeed import build_ds_config
from loop.config.schema import Config
from loop.memory.planner import MemoryPlan, plan_memory

PAGE = (ROOT / "loop" / "memory" / "README.md").read_text()
ROWS = re.findall(
    r"^\| (\d+) GiB \| [^|]+ \| (\d+B) \([^|]*\) \| ([\d.]+) GiB \|$",
    PAGE,
    re.M,
)
USABLE = 0.94  # of a card's memory
# (vocabulary, hidden, intermediate, layers, heads, key and value heads, size of a head)
SHAPES = {
    "8B": (128256, 4096, 14336, 32, 32, 8, 128),
    "13B": (32000, 5120, 13824, 40, 40, 40, 128),
    "24B": (131072, 5120, 32768, 40, 32, 8, 128),
    "32B": (152064, 5120, 27648, 64, 40, 8, 128),
    "70B": (128256, 8192, 28672, 80, 64, 8, 128),
}


def plan(base: str, gib: str, saving: bool = True) -> MemoryPlan:
    vocab, hidden, inner, layers, heads, kv_heads, head_dim = SHAPES[base]
    shape = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=False,
    )
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    config = Config(
        base="x",
        data={"train": "x"},
        lora=lora,
        embedding_on_cpu=saving,
        chunked_loss=saving,
    )
    memory = int(int(gib) * USABLE * 2**30)
    return plan_memory(config, build_ds_config(config, for_gpus=True), shape, 1, memory, 0.27)


def test_the_table_has_all_cards():
    assert [int(row[0]) for row in ROWS] == [8, 12, 16, 24, 48, 80, 141]
    assert f"{USABLE:.0%}".replace("%", " %") in PAGE


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_card_runs_what_the_table_says_and_nothing_larger(row):
    gib, base, estimated = row
    found = plan(base, gib)
    assert found.fits and found.total / 2**30 == pytest.approx(float(estimated), abs=0.06)
    larger = list(SHAPES)[list(SHAPES).index(base) + 1 :][:1]
    assert not any(plan(name, gib).fits for name in larger)


def test_a_small_card_needs_the_settings():
    assert plan("8B", "8").total < 7.5 * 2**30
    assert not plan("8B", "8", saving=False).fits
