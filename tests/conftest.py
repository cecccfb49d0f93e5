"""What the tests share: a tiny random base, examples of very unequal length, and a way to run code on several ranks."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# What ./launch.sh check found on this machine must not decide what the tests test.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="soap-tests-")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would what the tests start

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real dialogues, where the machine has them


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world_size: int, *command: str, timeout: int = 300, gpu: bool = False, **env: str) -> list[subprocess.CompletedProcess]:
    """Runs `python COMMAND...` as `world_size` ranks (gloo, or NCCL with gpu) and returns the finished processes by rank.
    A rank that hangs fails the test."""
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | ({} if gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
        processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | quiet | ranks | env, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    try:
        outputs = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p, out in zip(processes, outputs)]


def run_ok(world_size: int, *command: str, **options) -> str:
    """run_ranks, all of which must end with 0; returns rank 0's standard output."""
    done = run_ranks(world_size, *command, **options)
    for rank, p in enumerate(done):
        assert p.returncode == 0, f"rank {rank} ended with {p.returncode}:\n{p.stderr[-3000:]}"
    return done[0].stdout


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A folder in the hub's layout: three decoder layers with random weights, grouped queries, and a byte-level tokenizer."""
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
        trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.2,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tinyllama(tiny_base, tmp_path_factory) -> str:
    """TinyLlama-1.1B's shape with random weights and the tiny base's tokenizer, written by a GPU."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tinyllama")
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(tinyllama_shape()).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return str(folder)


def tinyllama_shape():
    """The published configuration of TinyLlama/TinyLlama-1.1B-Chat-v1.0."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                       num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip


def write_rows(path: Path, prefix: str, count: int, seed: int, longest: int = 8) -> str:
    """Made-up dialogues and notes; notes of 1 to some 200 tokens, so that their numbers of targets are very unequal."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            turns = [f"Doctor: {rng.randint(0, 999)}?\nPatient: pain {rng.randint(0, 99)}" for _ in range(rng.randint(1, longest))]
            note = (
                f"S: {rng.randint(0, 9)}"
                if i % 3 == 0
                else f"S: pain\nO: {' '.join(str(rng.random()) for _ in range(rng.randint(1, 9)))}\nA: a\nP: p"
            )
            file.write(json.dumps({"id": f"{prefix}-{i}", "dialogue": "\n".join(turns), "soap": note}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """Paths of small train, valid and test files."""
    folder = tmp_path_factory.mktemp("rows")
    return {"train": write_rows(folder / "train.jsonl", "train", 40, 1), "valid": write_rows(folder / "valid.jsonl", "valid", 6, 2)}


@pytest.fixture
def config_file(tiny_base, rows, tmp_path) -> Path:
    """A small but complete configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({
        "base": tiny_base, "data": {"train": rows["train"], "valid": rows["valid"]}, "max_seq_len": 1024, "batch_size": 4, "lr": 1e-3,
        "run": {"dir": str(tmp_path / "runs"), "name": "t", "save_steps": 2, "audit": 0}, "monitor": {"eval_steps": 3},
    }))  # fmt: skip
    return path


@pytest.fixture(scope="session")
def trained(tiny_base, rows, tmp_path_factory) -> Path:
    """The folder of a finished run: two ranks, bf16, dropout on, six steps, evaluated, sampled, saved."""
    folder = tmp_path_factory.mktemp("trained")
    config = {
        "base": tiny_base,
        "data": {"train": rows["train"], "valid": rows["valid"], "test": rows["valid"]},
        "max_seq_len": 512,
        "batch_size": 4,
        "lr": 1e-2,
        "max_steps": 6,
        "run": {"dir": str(folder), "name": "run", "save_steps": 2},
        "monitor": {"eval_steps": 3, "sample_notes": ["valid-1"], "sample_max_new_tokens": 12},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "stdout").write_text(run_ok(2, "-m", "loop.train", "--config", str(folder / "config.yaml")))
    return folder / "run"


# Two workers take a file each, in this order: the longest ones first, or one worker would wait for the other's at the end.
LONGEST = ("test_train.py", "test_readme.py", "test_checkpoint.py", "test_kill.py", "test_watchdog.py", "test_evaluate.py", "test_launch.py")


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
