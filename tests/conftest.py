"""Fixtures: a tiny random base, small files of examples, a configuration, and the folder of a
finished run.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from fork_server import start_server

# A shell's background job ignores Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "LOOP_TESTS_PYTHON" not in os.environ:  # other workers have the environment of the first one
    # What ./launch.sh check found on this machine must not decide what the tests test.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="soap-tests-")
    os.environ["LOOP_TESTS_PYTHON"] = start_server()

from helpers import bf16_file, run_ok, tinyllama_shape, write_rows  # noqa: E402


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A folder in the hub's layout: three decoder layers with random weights, grouped queries, and
    a byte-level tokenizer.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        ["Doctor: Patient: pain S: O: A: P:"],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tinyllama(tiny_base, tmp_path_factory) -> str:
    """TinyLlama-1.1B's shape with random weights and the tiny base's tokenizer, made on a GPU."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tinyllama")
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(tinyllama_shape()).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """Paths of small train, valid and test files."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        "train": write_rows(folder / "train.jsonl", "train", 40, 1),
        "valid": write_rows(folder / "valid.jsonl", "valid", 6, 2),
    }


@pytest.fixture
def config_file(tiny_base, rows, tmp_path) -> Path:
    """A small but complete configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
                "base": tiny_base,
                "data": {"train": rows["train"], "valid": rows["valid"]},
                "max_seq_len": 1024,
                "batch_size": 4,
                "lr": 1e-3,
                "run": {
                    "dir": str(tmp_path / "runs"),
                    "name": "t",
                    "save_steps": 2,
                    "export_check_examples": 0,
                },
                "monitor": {"eval_steps": 3},
            }
        )
    )
    return path


@pytest.fixture(scope="session")
def trained(tiny_base, rows, tmp_path_factory) -> Path:
    """The folder of a finished run: two ranks, bf16, dropout on, six steps, evaluated, sampled,
    saved.
    """
    folder = tmp_path_factory.mktemp("trained")
    config = {
        "base": tiny_base,
        "data": {"train": rows["train"], "valid": rows["valid"], "test": rows["valid"]},
        "max_seq_len": 512,
        "batch_size": 4,
        "lr": 1e-2,
        "max_steps": 6,
        "deepspeed": bf16_file(folder),
        "run": {"dir": str(folder), "name": "run", "save_steps": 2},
        "monitor": {"eval_steps": 3, "sample_notes": ["valid-1"]},
        "generation": {"max_new_tokens": 12},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "stdout").write_text(
        run_ok(2, "-m", "loop.train", "--config", str(folder / "config.yaml"))
    )
    return folder / "run"


# Two workers take a file each, in this order: the longest ones first, or one worker would wait for
# the other's at the end.
LONGEST = (
    "test_readme.py",
    "test_gradient.py",
    "test_evaluate.py",
    "test_checkpointer.py",
    "test_kernels_check.py",
    "test_best.py",
    "test_launcher.py",
    "test_kill.py",
    "test_wiring.py",
    "test_watchdog.py",
    "test_estimate.py",
    "test_same_notes.py",
    "test_break.py",
)


def pytest_collection_finish() -> None:
    """Gives each of several workers its part of the cores: torch would take all of them in each,
    and its threads would wait for one another.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch = sys.modules.get("torch")
    if torch and workers > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )
