"""The merged model is the adapted one."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.config import ConfigError
from loop.merge import merge
from loop.model import load_base


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(5, 45)[None], use_cache=False).logits.float()


@pytest.mark.parametrize("into", ["16bit", "nf4"])
def test_merging_gives_base_plus_adapter(trained, tiny_base, tmp_path, into):
    done = subprocess.run([sys.executable, "-m", "loop.merge", "--adapter", str(trained / "adapter"), "--out", str(tmp_path / "m"), "--into", into],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16))
    adapted = PeftModel.from_pretrained(load_base(tiny_base, torch.bfloat16, "cpu", quantized=into == "nf4"), str(trained / "adapter"))
    with adapted.disable_adapter():
        base = logits(adapted)
    ours, other = (merged - logits(adapted)).norm(), (merged - base).norm()
    assert ours < 0.1 * other  # bf16 rounding of W + BA, against what the adapter changes
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    assert not (tmp_path / "m" / "adapter_config.json").exists()


def test_what_cannot_be_merged_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="no adapter_config.json"):
        merge(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge(str(trained / "adapter"), str(tmp_path / "full"))
