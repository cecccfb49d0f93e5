"""Every mistake of the configuration is one line that names the key, and comes before anything is
loaded.
"""

import pytest
import yaml
from helpers import ROOT

from loop.config.cli import load_config
from loop.config.schema import Config, ConfigError

SEED = ROOT / "loop" / "configs" / "soap_qlora.yaml"


def load(*args: str) -> Config:
    return load_config(["--config", str(SEED), *args])


def test_the_seed_configuration_is_the_missions():
    c = load()
    assert c.base == "TinyLlama/TinyLlama-1.1B-Chat-v1.0" and c.method == "qlora" and c.double_quant
    assert (c.lora["r"], c.lora["lora_dropout"], c.lora["target_modules"]) == (8, 0.1, "all-linear")
    assert c.data.train == "omi-health/medical-dialogue-to-soap-summary"
    assert c.data.columns["note"] == "soap"
    assert (c.max_seq_len, c.batch_size, c.tokens_per_step) == (2048, 8, 16384)
    assert (c.lr, c.warmup_steps, c.epochs) == (1e-4, 0, 1)
    assert (c.weight_decay, c.max_grad_norm) == (1e-4, 1.0)
    assert c.restart_steps is None and c.seed == 42


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["lr=abc"], "lr='abc'"),
        (["lr=-1"], "lr=-1"),
        (["lrr=1"], "lrr=1: unknown key"),
        (["data.foo=1"], "data.foo=1: unknown key"),
        (["method=dpo"], "method='dpo'"),
        (["batch_size=0"], "batch_size=0"),
        (["batch_size=2.5"], "batch_size=2.5"),
        (["batch_size=true"], "batch_size"),
        (["micro_batch_size=9"], "batch_size=8"),
        (["min_lr=1"], "min_lr"),
        (["betas=[0.9, 1.0]"], "betas"),
        (["lora.rank=8"], "'rank'"),
        (["lora.r=0"], "r must be"),
        (["lora.use_dora=true"], "use_dora does not work on a partitioned 4-bit base"),
        (["lora.task_type=CAUSAL_LM"], "task_type is set by the loop; leave it out"),
        (["lora.lora_dropout=much"], "lora_dropout must be a number"),
        (["lora.lora_alpha=.inf"], "lora_alpha must be a number"),
        (["lora.rank_pattern={q_proj: 0}"], "rank_pattern: 'q_proj': '0' is no such number"),
        (["lora.rank_pattern={q_proj: 2.5}"], "rank_pattern: 'q_proj': 2.5 is not a whole number"),
        (["lora.alpha_pattern={q_proj: -1}"], "alpha_pattern: 'q_proj': '-1' is no such number"),
        (["max_seq_len=1000000", "batch_size=10000"], "tokens a step"),
        (["method=full", "adapter=some"], "adapter=some: method=full trains no adapter"),
        (["data.train=[]"], "data.train=[]: name at least one source"),
        (["data.columns={dialogue: '', note: soap}"], "data.columns.dialogue: names no column"),
        (["lora.target_parameters=[nothing]"], "target_parameters: tensors get no LoRA"),
        (["lora.use_qalora=true"], "use_qalora is a variant of LoRA that the loop has not"),
        (["lora.alora_invocation_tokens=[1,2]"], "alora_invocation_tokens is a variant of LoRA"),
        (["lora.layer_replication=[[0,2],[1,3]]"], "layer_replication is a variant of LoRA"),
        (["lora.init_lora_weights=pissa"], "init_lora_weights='pissa'"),
        (["gradient_checkpointing=maybe"], "'auto'"),
        (["data.train=3"], "data.train=3"),
        (["lr.x=1"], "lr is a value"),
        (["--lr", "3"], "--lr: not understood"),
        (["data.columns={id: id}"], "data.columns"),
        (["--config"], "--config"),
        (["lr=[1"], "not a YAML value"),
        (["run.name=''"], "run.name"),
        (["run.name=a/.."], "run.name=a/.."),
        (["lora.lora_dropout=1.0"], "lora_dropout"),
        (["run.stall_timeout_minutes=.inf"], "run.stall_timeout_minutes"),
        (["seed=99999999999999999999"], "seed"),
        (["data.weights=[.nan]"], "data.weights"),
        (["generation.temperature=-1"], "generation.temperature=-1"),
        (["generation.temperature=.inf"], "generation.temperature=inf"),
        (["generation.top_p=0"], "generation.top_p=0"),
        (["generation.min_p=1.5"], "generation.min_p=1.5"),
        (["generation.max_new_tokens=0"], "generation.max_new_tokens=0"),
        (["generation.no_repeat_ngram=true"], "generation.no_repeat_ngram"),
        (["generation.beams=2"], "generation.beams=2: unknown key"),
        (["generation.top_p=0.9"], "generation: top_p=0.9 means something only with a temp"),
        (["generation.candidates=4"], "generation: candidates=4 means something only with a temp"),
        (["generation.candidates=0"], "generation.candidates=0"),
        (["generation.candidates=65"], "generation.candidates=65"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(args, words):
    with pytest.raises(ConfigError) as caught:
        load(*args)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_one_lora_field_keeps_the_others_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("base: x\ndata: {train: x}\n")
    assert load_config(["--config", str(tmp_path / "c.yaml"), "lora.r=32"]).lora == {
        "r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
    }


def test_the_resolved_configuration_loads_again(tmp_path):
    c = load("lr=3e-4", "monitor.sample_notes=[a]")
    text = yaml.safe_dump(c.model_dump(mode="json"), sort_keys=False)  # as a run writes it
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == c


def test_a_run_stays_in_the_folder_of_runs():
    for name in ("/tmp/x", "/", "..", "."):
        with pytest.raises(ConfigError, match="run.name=.*must be the name of a folder in run.dir"):
            load(f"run.name={name}")
