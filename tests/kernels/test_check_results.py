"""The results of `./launch.sh check` decide what a run uses."""

import types
from dataclasses import asdict

import numpy as np
import pytest
import torch

from kernels_check.rows import Row
from loop.config.schema import ROOT, Config, ConfigError
from loop.kernels import attention_backends, check_results
from loop.kernels.attention import ATTENTION_BACKENDS, AttentionError
from loop.kernels.fuse import choose_fused_layers
from loop.kernels.lora_ops import FUSED_OPS
from loop.monitor.mfu import build_mfu
from loop.optim.adamw import choose_fused_adamw

WRONG = {
    "version": "2.8.3",
    "verdict": "wrong",
    "error": 0.5,
    "bound": 0.02,
    "note": "set attention= to another",
}


@pytest.fixture
def save_rows(tmp_path, monkeypatch):
    """Saves rows as the check does, for the loop to find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check_results.load.cache_clear()

    def save(*rows: Row):
        path = check_results.save(map(asdict, rows))
        check_results.load.cache_clear()
        return path

    yield save
    check_results.load.cache_clear()


def test_results_are_the_owners_alone_and_of_this_machine_and_these_versions(
    save_rows, monkeypatch
):
    assert check_results.load() == {}
    path = save_rows(Row("memory copy", speed=2.0, unit="GB/s"))
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert check_results.measured_speed("memory copy") == 2.0
    for change in (("platform.node", lambda: "another"), ("torch.version.cuda", "99.0")):
        with monkeypatch.context() as other:
            other.setattr(*change)
            check_results.load.cache_clear()
            assert check_results.load() == {}


# ---- self-tests of a run


@pytest.fixture
def tests_run(tmp_path, monkeypatch):
    """Runs a self-test as on a GPU; gives what it found, and how often it has run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check_results, "outcomes", {})
    runs = []

    def start(test="kernels, bf16", problem=None):
        found = check_results.run_once(test, "cuda", lambda: runs.append(1) or problem)
        return found, len(runs)

    return start


def test_a_self_test_that_was_passed_is_not_run_again_and_that_is_said(tests_run, monkeypatch):
    assert tests_run() == (None, 1)
    assert check_results.outcomes == {"kernels, bf16": "passed now"}
    assert tests_run() == (None, 1)
    assert check_results.outcomes == {"kernels, bf16": "passed earlier"}
    assert tests_run("kernels, fp16") == (None, 2)
    monkeypatch.setenv("LOOP_KERNEL_TESTS", "always")
    assert tests_run() == (None, 3)


def test_a_failure_is_tested_again(tests_run):
    assert tests_run(problem="error 0.5") == ("error 0.5", 1)
    assert tests_run(problem="error 0.5") == ("error 0.5", 2)
    assert check_results.outcomes == {}


@pytest.mark.parametrize(
    "change",
    [
        ("platform.node", lambda: "another"),
        ("torch.version.cuda", "99.0"),
        ("importlib.metadata.version", lambda name: "99.0"),
        ("loop.kernels.check_results.source_digest", lambda *folders: "other"),
        ("torch.cuda.device_count", lambda: 1),
        ("loop.kernels.check_results.DRIVER", ROOT / "LICENSE"),
    ],
    ids=lambda change: change[0],
)
def test_another_machine_version_source_gpu_or_driver_is_tested_anew(
    tests_run, monkeypatch, change
):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "another GPU")
    assert tests_run() == (None, 1)
    monkeypatch.setattr(*change)
    assert tests_run() == (None, 2)


def test_the_sources_of_checks_and_kernels_count(monkeypatch):
    seen = []
    monkeypatch.setattr(check_results, "source_digest", lambda *folders: seen.extend(folders) or "")
    check_results.machine_digest()
    assert seen == ["kernels_check", "loop/kernels"]


def damage(path):
    path.write_bytes(b"\xff\xfe")


def write_for_another_test(path):
    path.write_text("another test")


def append(path):
    path.write_text(path.read_text() + "x")


def let_others_write(path):
    path.chmod(0o666)


def make_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil", [damage, write_for_another_test, append, let_others_write, make_a_folder]
)
def test_a_damaged_or_planted_file_counts_for_nothing(tests_run, spoil):
    assert tests_run() == (None, 1)
    path = check_results.passed_path("kernels, bf16")
    assert path.stat().st_mode & 0o777 == 0o600
    spoil(path)
    assert tests_run() == (None, 2)


def test_a_file_of_another_user_counts_for_nothing(tests_run, monkeypatch):
    assert tests_run() == (None, 1)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert tests_run() == (None, 2)


def test_on_a_cpu_tests_are_always_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs = []
    for _ in range(2):
        check_results.run_once("attention", "cpu", lambda: runs.append(1))
    assert len(runs) == 2 and not list(tmp_path.iterdir())


# ---- attention


@pytest.fixture
def three_backends(monkeypatch):
    versions = {
        "flash_attn_4": "missing: not installed",
        "flash_attn": "1",
        "varlen": "1",
        "sdpa": "1",
    }
    monkeypatch.setattr(
        attention_backends,
        "installed_version",
        lambda backend, device: next(
            versions[name] for name, b in ATTENTION_BACKENDS.items() if b is backend
        ),
    )
    monkeypatch.setattr(attention_backends, "keeps_documents_apart", lambda *args: True)


def choose(wanted="auto"):
    return attention_backends.choose_backend(wanted, "cpu", torch.bfloat16)


def test_attention_auto_takes_the_first_that_was_found_right(save_rows, three_backends):
    """Not the fastest of the check: on its small rows speed is launch overhead."""
    note = "attention: flash_attn (1); flash_attn_4 missing: not installed"
    assert choose() == ("flash_attn", note)
    others = Row("attention varlen", speed=1.2), Row("attention sdpa", speed=2.0)
    save_rows(Row("attention flash_attn", speed=1.3), *others)
    assert choose()[0] == "flash_attn" and choose("varlen")[0] == "varlen"
    save_rows(Row("attention flash_attn", **WRONG), *others)
    assert choose()[0] == "varlen"


def test_attention_that_is_missing_is_said_after_a_check_too(save_rows):
    save_rows(Row("attention flash_attn", verdict="missing"), Row("attention sdpa", speed=1.0))
    _, note = choose()
    assert "flash_attn missing: needs an NVIDIA GPU" in note and "instead sdpa: costs" in note


@pytest.mark.parametrize("row", ["attention flash_attn", "attention flash_attn, leak"])
def test_attention_found_wrong_is_skipped_aloud_or_refused_with_its_row(
    save_rows, three_backends, row
):
    save_rows(Row("attention flash_attn"), Row(row, **WRONG))
    backend, note = choose()
    assert backend == "varlen" and "instead varlen" in note
    assert f"{row} (2.8.3), error 5.0e-01 over the bound 2e-02" in note
    with pytest.raises(AttentionError, match=row):
        choose("flash_attn")


def test_attention_whose_check_crashed_is_refused(save_rows, three_backends):
    crash = "killed by SIGSEGV after the row 'attention varlen'"
    save_rows(
        Row("attention sdpa"),
        Row("attention varlen"),
        Row("attention", verdict="wrong", note=crash),
    )
    backend, note = choose()
    assert backend == "varlen" and "SIGSEGV" in note
    assert choose("sdpa")[0] == "sdpa"


def test_attention_not_repeatable_is_no_reason_against_it(save_rows, three_backends):
    save_rows(Row("attention flash_attn"), Row("attention flash_attn, repeatable", **WRONG))
    assert choose("flash_attn")[0] == "flash_attn"


# ---- the optimizer, fused layers, MFU


def test_optimizer_auto_takes_the_faster_and_never_what_was_found_wrong(save_rows):
    fused = "optimizer AdamW fused"
    assert choose_fused_adamw("auto")[0] is torch.cuda.is_available()
    assert choose_fused_adamw("fused")[0] and not choose_fused_adamw("plain")[0]
    for speed in (0.5, 2.0):
        save_rows(Row(fused, speed=speed))
        assert choose_fused_adamw("auto") == (speed > 1, "")
    save_rows(Row(fused, **WRONG))
    chosen, note = choose_fused_adamw("auto")
    assert chosen is False and fused in note
    assert choose_fused_adamw("plain") == (False, "")
    with pytest.raises(ConfigError, match=f"optimizer=fused: wrong by ./launch.sh check: {fused}"):
        choose_fused_adamw("fused")


def ranks_that_find(*problems: str):
    """The calling rank, on a CPU, and others that found these problems."""
    return types.SimpleNamespace(
        device=torch.device("cpu"), all_gather_json=lambda value: [value, *problems]
    )


def choose_layers(wanted, ranks):
    config = Config(base="x", data={"train": "x"}, fused_layers=wanted)
    return choose_fused_layers(config, torch.bfloat16, ranks)


def test_fused_layers_are_skipped_aloud_or_refused_with_the_row(save_rows):
    here = ranks_that_find()
    assert choose_layers("auto", here) == choose_layers(True, here) == (True, "")
    assert choose_layers(False, here) == (False, "")
    chosen, note = choose_layers("auto", ranks_that_find("rotate: no such card"))
    assert chosen is False and "no such card" in note
    save_rows(Row("fused lora_down"), Row("fused rotate", **WRONG))
    chosen, note = choose_layers("auto", here)
    assert chosen is False and "fused rotate" in note
    assert choose_layers(False, here) == (False, "")
    refusal = "fused_layers=true: wrong by ./launch.sh check: fused rotate"
    with pytest.raises(ConfigError, match=refusal):
        choose_layers(True, here)


@pytest.mark.parametrize("op", FUSED_OPS)
def test_every_kernel_has_a_row_that_is_asked_for(save_rows, op):
    """The check writes "fused NAME" for each; the choice of layers reads all of them."""
    save_rows(*(Row(f"fused {other}", **WRONG if other == op else {}) for other in FUSED_OPS))
    assert f"fused {op}" in choose_layers("auto", ranks_that_find())[1]


def test_mfu_counts_what_the_model_needs_under_a_measured_ceiling(save_rows, monkeypatch):
    model = torch.nn.Module()
    model.frozen, model.trained, model.head = (
        torch.nn.Linear(4, n, bias=False) for n in (8, 2, 100)
    )
    model.frozen.requires_grad_(False)
    model.head.requires_grad_(False)
    model.get_output_embeddings = lambda: model.head
    model_config = types.SimpleNamespace(num_hidden_layers=3, num_attention_heads=2, head_dim=4)
    monkeypatch.setattr("loop.monitor.mfu.matrix_rate", lambda device: 1e-6)

    def mfu(device: str) -> dict[str, float]:
        ranks = types.SimpleNamespace(world_size=2, device=torch.device(device))
        return build_mfu(model, model_config, ranks)(np.array([10, 30]), 7, 0.5)

    flops = (4 * 32 + 6 * 8) * 40 + 4 * 400 * 7 + 6 * 3 * 2 * 4 * (100 + 900)
    assert mfu("cuda") == {"train/mfu": pytest.approx(flops / 0.5 / 2e6)}
    save_rows(Row("bf16 matrix product", speed=2e-6, unit="TFLOP/s"))
    assert mfu("cuda") == {"train/mfu": pytest.approx(flops / 0.5 / 4e6)}
    assert mfu("cpu") == {}
