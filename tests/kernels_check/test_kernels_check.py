"""Planted faults: each is caught by the row that is meant for it, and by no other."""

import importlib.metadata
import os
import signal
import sys
import time
import types
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

import loop.kernels.attention
import loop.kernels.attention_backends
import loop.kernels.lora_ops
from kernels_check import (
    attention,
    ceilings,
    codebook,
    collectives,
    compiled,
    environment,
    fused,
    leak,
    nf4,
    optimizers,
    packages,
    processes,
    ranks,
    repacking,
    repeatable,
    run,
    zero3,
)
from kernels_check.rows import Row, guarded, judge
from kernels_check.table import table
from loop.config.schema import Config, ConfigError
from loop.kernels import check_results as verdicts_of_loop
from loop.kernels.attention import packed_attention
from loop.kernels.fuse import choose_fused_layers
from loop.monitor.mfu import utilisation
from loop.optim.adamw import choose_fused_adamw

sdpa = partial(packed_attention, backend="sdpa")


def verdicts(*results) -> dict[str, str]:
    return {row.what: row.verdict for rows in results for row in rows}


# ---- rows and the runner


@pytest.mark.parametrize(
    "error, speed, verdict",
    [(0.1, 2.0, "ok"), (0.1, 0.1, "slow"), (2.0, 2.0, "wrong"), (float("nan"), 2.0, "wrong")],
)
def test_judge(error, speed, verdict):
    row = judge("a", "1", error, 1.0, "remedy", speed=speed, slowest=0.5)
    assert row.verdict == verdict and ("remedy" in row.note) == (verdict != "ok")
    assert row.blocks() == (verdict == "wrong")


def first_then(fault):
    yield Row("first")
    yield from fault() or ()


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    time.sleep(99)


def leave():
    sys.exit("no such kernel")


@pytest.mark.parametrize(
    "fault, note",
    [
        (segfault, "killed by SIGSEGV after the row 'first'"),
        (hang, "no end within 3 s"),
        (leave, "no such kernel"),
    ],
)
def test_crash_and_hang_become_rows_and_keep_earlier_ones(fault, note):
    first, last = run.finish(run.begin(partial(first_then, fault), "attention"), timeout=3)
    assert (first.what, first.verdict) == ("first", "ok")
    assert (last.what, last.verdict, last.blocks()) == (
        "attention",
        "wrong",
        True,
    ) and note in last.note


def test_processes_are_forked_only_where_that_works(monkeypatch):
    assert processes.context().get_start_method() == "forkserver"
    monkeypatch.setattr(
        processes, "_fork_works", leave
    )  # as it ends where an import has touched CUDA
    assert processes.context.__wrapped__().get_start_method() == "spawn"


def test_silence_is_a_row():
    (row,) = run.finish(run.begin(tuple, "attention"))
    assert row.blocks() and "after 0 rows" in row.note


def rank_that_hangs(device):
    if dist.get_rank() == 1:
        time.sleep(99)
    dist.barrier()
    yield Row("never")


def test_ranks_end_with_their_check():
    check = run.begin(partial(ranks.on_ranks, rank_that_hangs), "zero3")
    (row,) = run.finish(check, timeout=5)
    assert row.verdict == "wrong" and "no end within 5 s" in row.note
    with pytest.raises(
        ProcessLookupError
    ):  # its whole group is gone; a moment for the last of it to be reaped
        for _ in range(50):
            os.killpg(check.process.pid, 0)
            time.sleep(0.1)


def test_check_without_its_package_is_not_checked_rather_than_wrong(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (row,) = run.rows_of("nf4")
    assert (
        row.verdict == "missing"
        and row.blocks()
        and "not checked" in row.note
        and "bitsandbytes" in row.note
    )


def test_table_names_remedies_and_remarks():
    text = table(
        [
            Row("fine"),
            Row("old", note="tested with 2"),
            Row("bad", verdict="wrong", note="do this"),
            Row("no", verdict="missing", note="why", required=False),
        ]
    )
    assert (
        "ok: old: tested with 2" in text
        and "wrong: bad: do this" in text
        and "missing, not required: no: why" in text
        and ": fine:" not in text
    )


# ---- environment


def torch_row(version="2.13.0+cpu", load=lambda name: types.ModuleType(name)):
    return list(
        guarded("torch", packages.check_package, "torch", "2.13.0", lambda name: version, load)
    )[0]


def test_pinned_version_is_ok_whatever_its_build():
    assert torch_row().verdict == "ok"


def test_other_version_than_the_pin_is_named_and_stops_nothing():
    row = torch_row("2.12.1")
    assert row.verdict == "ok" and "tested with 2.13.0" in row.note


def test_stale_build():
    row = torch_row(load=lambda name: types.SimpleNamespace(__version__="2.11.0+cu130"))
    assert row.verdict == "wrong" and "stale" in row.note and row.blocks()
    operators = lambda built_for: next(
        environment.check_operators({"cpu_adam": True}, {"cpu_adam": True}, built_for)
    )  # noqa: E731
    now = ".".join(torch.__version__.split(".")[:2])
    assert (
        operators("2.1").verdict == "wrong"
        and "stale" in operators("2.1").note
        and operators(now).verdict == "ok"
    )


def test_pin_for_another_python_does_not_count():
    text = (
        "# one set\na==1.0; python_version >= '3.9'\na==0.9; python_version < '3.9' # old\nb==2\n"
    )
    assert packages.pins(text) == {"a": "1.0", "b": "2"}


def test_undefined_symbol():
    def load(name):
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi")

    row = torch_row(load=load)
    assert row.verdict == "wrong" and "another torch" in row.note and row.blocks()


def test_missing_library():
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    (row,) = packages.check_package("deepspeed", "0.19.8", absent)
    assert row.verdict == "missing" and "pip install deepspeed==0.19.8" in row.note and row.blocks()


def test_broken_package_has_one_row_and_the_others_go_on(monkeypatch):
    def load(name):
        if name == "bitsandbytes":
            raise ImportError("libbitsandbytes.so: undefined symbol: cgemm_4bit")
        return types.ModuleType(name)

    monkeypatch.delitem(sys.modules, "bitsandbytes")
    found = verdicts(packages.main(load))
    assert (
        wrong(found) == ["bitsandbytes"] and "bitsandbytes library" not in found and len(found) > 10
    )


def test_native_library_that_did_not_load():
    class ErrorHandlerMockBNBNativeLibrary:
        pass

    assert verdicts(packages.check_native("1", ErrorHandlerMockBNBNativeLibrary())) == {
        "bitsandbytes library": "wrong"
    }
    assert verdicts(packages.check_native("1", object())) == {"bitsandbytes library": "ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants a torch that can't see the GPU")
def test_cpu_build_of_torch_on_a_gpu_machine():
    (row,) = environment.check_cuda("580.1", None)
    assert row.verdict == "wrong" and row.blocks()
    assert not next(environment.check_cuda("", None)).blocks()


# ---- attention


def attention_rows(attend):
    checks = (attention.check_numbers, leak.check_leak, repeatable.check_repeatable)
    return verdicts(*(check("x", "1", attend, "cpu") for check in checks))


def attention_faults(attend):
    return {
        what.removeprefix("attention x").removeprefix(", ") or "numbers"
        for what, verdict in attention_rows(attend).items()
        if verdict == "wrong"
    }


def test_attention_right():
    assert set(attention_rows(sdpa).values()) == {"ok"}


def test_attention_wrong_scale_is_no_leak():
    assert attention_faults(lambda *row: sdpa(*row, scale=0.1)) == {"numbers"}


def test_attention_faint_leak_hides_in_the_numbers_only():
    assert attention_faults(lambda q, k, v, *rest: sdpa(q, k, v, *rest) + 0.02 * v.mean()) == {
        "leak"
    }


def test_attention_over_the_whole_row_leaks():
    assert attention_faults(
        lambda q, k, v, bounds, longest: sdpa(q, k, v, bounds[[0, -1]], len(q))
    ) == {"numbers", "leak"}


class AnyOrder(torch.autograd.Function):
    """The backward pass of a kernel that adds in no fixed order: right but for the last bits."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 4e-3 * torch.randint(0, 2, grad.shape))


def test_attention_whose_backward_differs_from_run_to_run():
    assert attention_faults(lambda q, *rest: sdpa(AnyOrder.apply(q), *rest)) == {"repeatable"}


def test_attention_nan_in_padding():
    def attend(q, k, v, bounds, longest):
        out = sdpa(q, k, v, bounds, longest)
        return torch.where(torch.arange(len(out))[:, None, None] < bounds[-4], out, torch.nan)

    assert attention_rows(attend)["attention x"] == "wrong"


def test_flash_attn_of_another_abi(monkeypatch):
    broken = {
        "flash_attn": "missing: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E",
        "varlen": "missing: needs an NVIDIA GPU",
    }
    monkeypatch.setattr(loop.kernels.attention_backends, "available_backends", lambda device: broken)
    found = {row.what: row for row in attention.main()}
    assert (
        found["attention flash_attn"].verdict == "wrong"
        and "another torch" in found["attention flash_attn"].note
    )
    assert found["attention varlen"].verdict == "missing" and not any(
        row.blocks() for row in found.values()
    )


# ---- NF4

bnb = pytest.importorskip("bitsandbytes")
quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
ROUNDING = [
    f"nf4 rounding, stored as {storage}" for storage in ("uint8", "bfloat16", "float16", "float32")
] + ["nf4 double quantisation"]


def nf4_rows(code=None, decode=dequantize, matmul=bnb.matmul_4bit):
    code = codebook.plain_codebook() if code is None else code
    return verdicts(
        codebook.check_codebook("1", code),
        nf4.check_rounding("1", quantize, decode, "cpu"),
        nf4.check_product("1", matmul, quantize, dequantize, "cpu"),
    )


def wrong(found: dict[str, str]) -> list[str]:
    return [what for what, verdict in found.items() if verdict in ("wrong", "missing")]


def test_nf4_right():
    assert wrong(nf4_rows()) == []


def test_published_codebook():
    # QLoRA, arXiv 2305.14314, appendix E, four of its sixteen values
    code = codebook.plain_codebook()
    assert code[[0, 1, 7, 8]].tolist() == pytest.approx(
        [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534], abs=1e-6
    )


def test_corrupt_codebook():
    code = codebook.plain_codebook()
    code[3] += 1e-3
    assert wrong(nf4_rows(code=code)) == ["nf4 codebook"]


def test_wrong_scale_of_blocks():
    assert (
        wrong(nf4_rows(decode=lambda packed, state: 1.01 * dequantize(packed, state))) == ROUNDING
    )


def test_double_quantisation_without_its_offset():
    def decode(packed, state):
        if state.nested:
            state.offset = state.offset * 0
        return dequantize(packed, state)

    assert wrong(nf4_rows(decode=decode)) == ["nf4 double quantisation"]


def test_product_without_its_gradient_or_off_by_a_scale():
    assert wrong(nf4_rows(matmul=lambda *a, **k: 1.05 * bnb.matmul_4bit(*a, **k))) == [
        "nf4 product and gradient"
    ]


def repack(switch):
    layer = bnb.nn.Linear4bit(
        256,
        128,
        bias=False,
        quant_type="nf4",
        compute_dtype=torch.bfloat16,
        quant_storage=torch.bfloat16,
    ).to("cpu")
    layer.support_avx512bf16_for_cpu = switch
    return verdicts(repacking.check_repacking("repacking", "1", layer))


def test_repacking_switched_off_changes_nothing():
    assert repack(False) == {"repacking": "ok"}


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16, so nothing repacks"
)
def test_repacking_in_eval_is_caught():
    assert repack(True) == {"repacking": "wrong"}


# ---- optimizers, ceilings


@pytest.mark.parametrize(
    "change, verdict",
    [({}, "ok"), ({"weight_decay": 0.1}, "wrong"), ({"betas": (0.9, 0.999)}, "wrong")],
)
def test_optimizer(change, verdict):
    make = lambda p, **settings: torch.optim.AdamW(p, **(settings | change))  # noqa: E731
    (found,) = verdicts(optimizers.check_optimizer("x", "1", make, 1e-5, "cpu")).values()
    assert found.replace("slow", "ok") == verdict


def test_eight_bit_moments_are_within_their_bound():
    (row,) = optimizers.check_optimizer(
        "AdamW8bit", "1", bnb.optim.AdamW8bit, optimizers.EIGHT_BIT_BOUND, "cpu"
    )
    assert row.verdict in ("ok", "slow")


def half_dropped(term):
    """A kernel that forgets the last, partial block of tokens."""

    def broken(*args):
        out = [
            part.clone()
            for part in (term(*args) if isinstance(term(*args), tuple) else (term(*args),))
        ]
        for part in out:
            part[len(part) // 128 * 128 :] = 0
        return out[0] if len(out) == 1 else tuple(out)

    return broken


def test_fused_terms():
    for name, args in fused.inputs("cpu").items():
        term = getattr(loop.kernels.lora_ops, name)
        assert wrong(verdicts(fused.check_term(name, term, args, "cpu"))) == [], name
    for name in ("lora_down", "lora_grad_input", "swiglu", "swiglu_backward"):
        broken = half_dropped(getattr(loop.kernels.lora_ops, name))
        assert wrong(
            verdicts(fused.check_term(name, broken, fused.inputs("cpu")[name], "cpu"))
        ) == [f"fused {name}"]
    scaled = lambda *args: tuple(0.9 * part for part in loop.kernels.lora_ops.grad_lora_a(*args))  # noqa: E731
    assert wrong(
        verdicts(fused.check_term("grad_lora_a", scaled, fused.inputs("cpu")["grad_lora_a"], "cpu"))
    ) == ["fused grad_lora_a"]


def test_ceilings():
    assert wrong(verdicts(ceilings.check_matrix_rate("cpu", lambda a, b: 1.1 * (a @ b)))) == [
        "bf16 matrix product"
    ]
    assert wrong(
        verdicts(
            ceilings.check_bandwidth("cpu", lambda target, source: target[1:].copy_(source[1:]))
        )
    ) == ["memory copy"]


# ---- ranks: one start each, the fault and the sound case side by side


def all_reduce_that_forgets(x):
    dist.all_reduce(x)
    if x.numel() > 1 << 20:  # the large size only
        x[-1] = 0


def test_collectives_wrong_at_one_size():
    found = verdicts(
        ranks.on_ranks(
            collectives.check_collectives, all_reduce_that_forgets, dist.all_gather_into_tensor
        )
    )
    assert len(found) == 6 and [
        what.split(" ", 1)[1].rsplit(",", 1)[0] for what in wrong(found)
    ] == ["all-reduce, large"]


def test_zero3_fp16_storage_and_bf16_gradients_are_caught():
    config = ranks.zero3_config(2, data_types={"grad_accum_dtype": "bf16"})
    found = verdicts(
        ranks.on_ranks(
            zero3.partition_and_gather, (torch.bfloat16, torch.uint8, torch.float16), config
        )
    )
    assert (
        wrong(found) == ["zero3 NF4 stored as float16", "zero3 gradients add up in fp32"]
        and len(found) == 4
    )


# ---- compile, with a backend that needs no compiler


def graph_only(forward):
    return torch.compile(forward, backend="eager")


def off_by_a_tenth(forward):
    return graph_only(lambda *args, **kwargs: 1.1 * forward(*args, **kwargs))


def anew_for_each_layer(
    forward,
):  # as DeepSpeed's `ds_id` on each parameter does: a guard that differs by layer
    index = forward.__self__.self_attn.layer_idx
    return graph_only(lambda *args, **kwargs: forward(*args, **kwargs) if index < 9 else None)


def as_seen(compile) -> list[str]:
    return wrong(
        verdicts(
            ranks.on_ranks(compiled.check_compiled, compile, ranks.zero3_config(1), world_size=1)
        )
    )


def test_compiled_right():
    assert as_seen(graph_only) == []


def test_compiled_numbers_wrong():
    assert as_seen(off_by_a_tenth) == [compiled.WHAT]


def test_compiled_anew_for_each_layer():
    assert as_seen(anew_for_each_layer) == [f"{compiled.WHAT}, graphs beyond the first"]


# ---- the verdict drives the loop


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """Keeps rows as the check does, for the loop to find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdicts_of_loop.load.cache_clear()

    def keep(*rows: Row):
        file = verdicts_of_loop.save(map(asdict, rows))
        verdicts_of_loop.load.cache_clear()
        return file

    yield keep
    verdicts_of_loop.load.cache_clear()


WRONG = {
    "version": "2.8.3",
    "verdict": "wrong",
    "error": 0.5,
    "bound": 0.02,
    "note": "set attention= to another",
}


def test_verdict_is_the_owners_alone_and_of_this_machine_and_these_versions(verdict, monkeypatch):
    assert verdicts_of_loop.load() == {}
    file = verdict(Row("memory copy", speed=2.0, unit="GB/s"))
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert verdicts_of_loop.measured_speedup("memory copy") == 2.0
    for change in (("platform.node", lambda: "another"), ("torch.version.cuda", "99.0")):
        with monkeypatch.context() as other:
            other.setattr(*change)
            verdicts_of_loop.load.cache_clear()
            assert verdicts_of_loop.load() == {}


@pytest.fixture
def three_backends(monkeypatch):
    found = {
        "flash_attn_4": "missing: not installed",
        "flash_attn": "1",
        "varlen": "1",
        "sdpa": "1",
    }
    monkeypatch.setattr(loop.kernels.attention_backends, "available_backends", lambda device: found)
    monkeypatch.setattr(loop.kernels.attention_backends, "keeps_documents_apart", lambda *args: True)


def chosen(wanted="auto"):
    return loop.kernels.attention_backends.choose_backend(wanted, "cpu", torch.bfloat16)


def test_attention_auto_takes_the_first_that_was_found_right(verdict, three_backends):
    """Not the one with the best figure: on the check's small rows, whose figures are launch overhead, that is often the wrong one."""
    assert chosen() == (
        "flash_attn",
        "attention: flash_attn (1); flash_attn_4 missing: not installed",
    )
    verdict(
        Row("attention flash_attn", speed=1.3),
        Row("attention varlen", speed=1.2),
        Row("attention sdpa", speed=2.0),
    )
    assert chosen()[0] == "flash_attn" and chosen("varlen")[0] == "varlen"
    verdict(
        Row("attention flash_attn", **WRONG),
        Row("attention varlen", speed=1.2),
        Row("attention sdpa", speed=2.0),
    )
    assert chosen()[0] == "varlen"


def test_attention_that_is_missing_is_said_after_a_check_too(verdict):
    verdict(Row("attention flash_attn", verdict="missing"), Row("attention sdpa", speed=1.0))
    assert (
        "flash_attn missing: needs an NVIDIA GPU" in chosen()[1]
        and "instead sdpa: costs" in chosen()[1]
    )


@pytest.mark.parametrize("row", ["attention flash_attn", "attention flash_attn, leak"])
def test_attention_found_wrong_is_passed_over_aloud_or_refused_with_its_row(
    verdict, three_backends, row
):
    verdict(Row("attention flash_attn"), Row(row, **WRONG))
    backend, remark = chosen()
    assert (
        backend == "varlen"
        and f"{row} (2.8.3), error 5.0e-01 over the bound 2e-02" in remark
        and "instead varlen" in remark
    )
    with pytest.raises(loop.kernels.attention.AttentionError, match=row):
        chosen("flash_attn")


def test_attention_whose_check_crashed_is_refused(verdict, three_backends):
    verdict(
        Row("attention sdpa"),
        Row("attention varlen"),
        Row(
            "attention", verdict="wrong", note="killed by SIGSEGV after the row 'attention varlen'"
        ),
    )
    assert chosen()[0] == "varlen" and "SIGSEGV" in chosen()[1] and chosen("sdpa")[0] == "sdpa"


def test_attention_not_repeatable_is_no_reason_against_it(verdict, three_backends):
    verdict(Row("attention flash_attn"), Row("attention flash_attn, repeatable", **WRONG))
    assert chosen("flash_attn")[0] == "flash_attn"


def test_optimizer_auto_takes_the_faster_and_never_what_was_found_wrong(verdict):
    fused = "optimizer AdamW fused"
    assert (
        choose_fused_adamw("auto")[0] is torch.cuda.is_available()
        and choose_fused_adamw("fused")[0]
        and not choose_fused_adamw("plain")[0]
    )
    for speed in (0.5, 2.0):
        verdict(Row(fused, speed=speed))
        assert choose_fused_adamw("auto") == (speed > 1, "")
    verdict(Row(fused, **WRONG))
    assert (
        choose_fused_adamw("auto")[0] is False
        and fused in choose_fused_adamw("auto")[1]
        and choose_fused_adamw("plain") == (False, "")
    )
    with pytest.raises(ConfigError, match=f"optimizer=fused: wrong by ./launch.sh check: {fused}"):
        choose_fused_adamw("fused")


def test_fused_layers_are_passed_over_aloud_or_refused_with_the_row(verdict):
    here = types.SimpleNamespace(device=torch.device("cpu"), all_gather_json=lambda value: [value])
    other_fails = types.SimpleNamespace(
        device=torch.device("cpu"), all_gather_json=lambda value: [value, "rotate: no such card"]
    )

    def chosen(wanted, ranks=here):
        return choose_fused_layers(
            Config(base="x", data={"train": "x"}, fused_layers=wanted), torch.bfloat16, ranks
        )

    assert chosen("auto") == chosen(True) == (True, "") and chosen(False) == (False, "")
    assert (
        chosen("auto", other_fails)[0] is False and "no such card" in chosen("auto", other_fails)[1]
    )
    verdict(Row("fused lora_down"), Row("fused rotate", **WRONG))
    assert (
        chosen("auto")[0] is False
        and "fused rotate" in chosen("auto")[1]
        and chosen(False) == (False, "")
    )
    with pytest.raises(
        ConfigError, match="fused_layers=true: wrong by ./launch.sh check: fused rotate"
    ):
        chosen(True)


def test_mfu_counts_what_the_model_needs_under_a_measured_ceiling(verdict, monkeypatch):
    model = torch.nn.Module()
    model.frozen, model.trained, model.head = (
        torch.nn.Linear(4, n, bias=False) for n in (8, 2, 100)
    )
    model.frozen.requires_grad_(False), model.head.requires_grad_(False)
    model.get_output_embeddings = lambda: model.head
    shape = types.SimpleNamespace(num_hidden_layers=3, num_attention_heads=2, head_dim=4)
    here, cpu = (
        types.SimpleNamespace(world_size=2, device=torch.device(kind)) for kind in ("cuda", "cpu")
    )
    lengths = np.array([10, 30])
    monkeypatch.setattr("loop.monitor.mfu.matrix_rate", lambda device: 1e-6)
    flops = (4 * 32 + 6 * 8) * 40 + 4 * 400 * 7 + 6 * 3 * 2 * 4 * (100 + 900)
    assert utilisation(model, shape, here)(lengths, 7, 0.5) == {
        "train/mfu": pytest.approx(flops / 0.5 / 2e6)
    }
    verdict(Row("bf16 matrix product", speed=2e-6, unit="TFLOP/s"))
    assert utilisation(model, shape, here)(lengths, 7, 0.5) == {
        "train/mfu": pytest.approx(flops / 0.5 / 4e6)
    }
    assert utilisation(model, shape, cpu)(lengths, 7, 0.5) == {}
