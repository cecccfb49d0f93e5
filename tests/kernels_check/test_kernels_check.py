"""Planted faults: each is caught by the row that is meant for it, and by no other."""

import importlib.metadata
import os
import signal
import sys
import time
import types
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import wait_until

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
    rows,
    run,
    zero3,
)
from kernels_check.rows import Row, guarded, judge
from kernels_check.table import table
from loop.config.device import Card
from loop.kernels import lora_ops
from loop.kernels.attention import packed_attention

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


def test_the_shortest_of_five_times_counts_and_the_first_call_warms_up(monkeypatch):
    clock, lasts = [0.0], iter([0.1, 5.0, 3.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += next(lasts)

    assert rows.best_seconds(call, "cpu") == 3.0


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
    check = run.begin(partial(first_then, fault), "attention")
    wait_until(lambda: check.read("rows"), 60)  # from here on the clock counts
    first, last = run.finish(check, timeout=3)
    assert (first.what, first.verdict) == ("first", "ok")
    assert (last.what, last.verdict, last.blocks()) == ("attention", "wrong", True)
    assert note in last.note


def test_processes_are_forked_only_where_that_works(monkeypatch):
    assert processes.context().get_start_method() == "forkserver"
    monkeypatch.setattr(processes, "_fork_works", leave)  # as where an import has touched CUDA
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
    with pytest.raises(ProcessLookupError):  # its full group is gone
        for _ in range(50):  # a moment for the last of it to be reaped
            os.killpg(check.process.pid, 0)
            time.sleep(0.1)


def test_check_without_its_package_is_not_checked_rather_than_wrong(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (row,) = run.check_rows("nf4")
    assert row.verdict == "missing" and row.blocks()
    assert "not checked" in row.note and "bitsandbytes" in row.note


def test_table_names_remedies_and_notes():
    text = table(
        [
            Row("fine"),
            Row("old", note="tested with 2"),
            Row("bad", verdict="wrong", note="do this"),
            Row("no", verdict="missing", note="why", required=False),
        ]
    )
    assert "ok: old: tested with 2" in text
    assert "wrong: bad: do this" in text
    assert "missing, not required: no: why" in text
    assert ": fine:" not in text


# ---- environment


def torch_row(version="2.13.0+cpu", load=lambda name: types.ModuleType(name)):
    arguments = "torch", "2.13.0", lambda name: version, load
    return next(guarded("torch", packages.check_package, *arguments))


def test_pinned_version_is_ok_whatever_its_build():
    assert torch_row().verdict == "ok"


def test_other_version_than_the_pin_is_named_and_stops_nothing():
    row = torch_row("2.12.1")
    assert row.verdict == "ok" and "tested with 2.13.0" in row.note


def test_stale_build():
    row = torch_row(load=lambda name: types.SimpleNamespace(__version__="2.11.0+cu130"))
    assert row.verdict == "wrong" and "stale" in row.note and row.blocks()

    def operators(built_for):
        one = {"cpu_adam": True}
        return next(environment.check_operators(one, one, built_for))

    old = operators("2.1")
    assert old.verdict == "wrong" and "stale" in old.note
    assert operators(".".join(torch.__version__.split(".")[:2])).verdict == "ok"


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
    assert wrong(found) == ["bitsandbytes"]
    assert "bitsandbytes library" not in found and len(found) > 10


def test_native_library_that_did_not_load():
    class ErrorHandlerMockBNBNativeLibrary:
        pass

    what = "bitsandbytes library"
    mock = ErrorHandlerMockBNBNativeLibrary()
    assert verdicts(packages.check_native("1", mock)) == {what: "wrong"}
    assert verdicts(packages.check_native("1", object())) == {what: "ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants a torch that can't see the GPU")
def test_cpu_build_of_torch_on_a_gpu_machine():
    (row,) = environment.check_cuda(Card("A10", "580.1", "13.0"), None)
    assert row.verdict == "wrong" and row.blocks()
    assert not next(environment.check_cuda(None, None)).blocks()


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
    faults = attention_faults(lambda q, k, v, *rest: sdpa(q, k, v, *rest) + 0.02 * v.mean())
    assert faults == {"leak"}


def test_attention_over_the_full_row_leaks():
    def attend(q, k, v, bounds, longest):
        return sdpa(q, k, v, bounds[[0, -1]], len(q))

    assert attention_faults(attend) == {"numbers", "leak"}


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
    monkeypatch.setattr(attention, "available_backends", lambda device: broken)
    found = {row.what: row for row in attention.main()}
    row = found["attention flash_attn"]
    assert row.verdict == "wrong" and "another torch" in row.note
    assert found["attention varlen"].verdict == "missing"
    assert not any(row.blocks() for row in found.values())


# ---- NF4

bnb = pytest.importorskip("bitsandbytes")
quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
STORAGES = ("uint8", "bfloat16", "float16", "float32")
ROUNDING = [
    *(f"nf4 rounding, stored as {storage}" for storage in STORAGES),
    "nf4 double quantisation",
]


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
    """Four of the sixteen values of QLoRA, arXiv 2305.14314, appendix E."""
    published = [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534]
    code = codebook.plain_codebook()
    assert code[[0, 1, 7, 8]].tolist() == pytest.approx(published, abs=1e-6)


def test_corrupt_codebook():
    code = codebook.plain_codebook()
    code[3] += 1e-3
    assert wrong(nf4_rows(code=code)) == ["nf4 codebook"]


def test_wrong_scale_of_blocks():
    def decode(packed, state):
        return 1.01 * dequantize(packed, state)

    assert wrong(nf4_rows(decode=decode)) == ROUNDING


def test_double_quantisation_without_its_offset():
    def decode(packed, state):
        if state.nested:
            state.offset = state.offset * 0
        return dequantize(packed, state)

    assert wrong(nf4_rows(decode=decode)) == ["nf4 double quantisation"]


def test_product_without_its_gradient_or_off_by_a_scale():
    def matmul(*args, **kwargs):
        return 1.05 * bnb.matmul_4bit(*args, **kwargs)

    assert wrong(nf4_rows(matmul=matmul)) == ["nf4 product and gradient"]


def repack(switch):
    layer = repacking.linear4bit(bnb)
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
    def make(parameters, **settings):
        return torch.optim.AdamW(parameters, **(settings | change))

    (found,) = verdicts(optimizers.check_optimizer("x", "1", make, 1e-5, "cpu")).values()
    assert found.replace("slow", "ok") == verdict


def test_eight_bit_moments_are_within_their_bound():
    arguments = "AdamW8bit", "1", bnb.optim.AdamW8bit, optimizers.EIGHT_BIT_BOUND
    (row,) = optimizers.check_optimizer(*arguments, "cpu")
    assert row.verdict in ("ok", "slow")


def without_the_last_block(op):
    """A kernel that forgets the last, partial block of tokens."""

    def broken(*args):
        out = op(*args)
        parts = [part.clone() for part in (out if isinstance(out, tuple) else (out,))]
        for part in parts:
            part[len(part) // 128 * 128 :] = 0
        return parts[0] if len(parts) == 1 else tuple(parts)

    return broken


def scaled_grad_lora_a(*args):
    return tuple(0.9 * part for part in lora_ops.grad_lora_a(*args))


def test_fused_ops():
    inputs = fused.inputs("cpu")
    assert tuple(inputs) == lora_ops.FUSED_OPS

    def wrong_rows(name, op):
        return wrong(verdicts(fused.check_op(name, op, inputs[name], "cpu")))

    for name in lora_ops.FUSED_OPS:
        assert wrong_rows(name, getattr(lora_ops, name)) == [], name
    for name in ("lora_down", "lora_grad_input", "swiglu", "swiglu_backward"):
        broken = without_the_last_block(getattr(lora_ops, name))
        assert wrong_rows(name, broken) == [f"fused {name}"]
    assert wrong_rows("grad_lora_a", scaled_grad_lora_a) == ["fused grad_lora_a"]


def test_ceilings():
    rows = ceilings.check_matrix_rate("cpu", lambda a, b: 1.1 * (a @ b))
    assert wrong(verdicts(rows)) == ["bf16 matrix product"]
    rows = ceilings.check_bandwidth("cpu", lambda target, source: target[1:].copy_(source[1:]))
    assert wrong(verdicts(rows)) == ["memory copy"]


# ---- ranks: one start each, the fault and the sound case side by side


def all_reduce_that_forgets(x):
    dist.all_reduce(x)
    if x.numel() > 1 << 20:  # the large size only
        x[-1] = 0


def test_collectives_wrong_at_one_size():
    functions = all_reduce_that_forgets, dist.all_gather_into_tensor
    found = verdicts(ranks.on_ranks(collectives.check_collectives, *functions))
    assert len(found) == 6
    # without the backend and the number of ranks, which are the machine's
    assert [what.split(" ", 1)[1].rsplit(",", 1)[0] for what in wrong(found)] == [
        "all-reduce, large"
    ]


def test_zero3_fp16_storage_and_bf16_gradients_are_caught():
    config = ranks.zero3_config(2, data_types={"grad_accum_dtype": "bf16"})
    storages = torch.bfloat16, torch.uint8, torch.float16
    found = verdicts(ranks.on_ranks(zero3.partition_and_gather, storages, config))
    assert wrong(found) == ["zero3 NF4 stored as float16", "zero3 gradients add up in fp32"]
    assert len(found) == 4


# ---- compile, with a backend that needs no compiler


def graph_only(forward):
    return torch.compile(forward, backend="eager")


def off_by_a_tenth(forward):
    return graph_only(lambda *args, **kwargs: 1.1 * forward(*args, **kwargs))


def anew_for_each_layer(forward):
    """As DeepSpeed's `ds_id` on each parameter does: a guard that differs by layer."""
    index = forward.__self__.self_attn.layer_idx
    return graph_only(lambda *args, **kwargs: forward(*args, **kwargs) if index < 9 else None)


def as_seen(compile) -> list[str]:
    arguments = compile, ranks.zero3_config(1)
    return wrong(verdicts(ranks.on_ranks(compiled.check_compiled, *arguments, world_size=1)))


def test_compiled_right():
    assert as_seen(graph_only) == []


def test_compiled_numbers_wrong():
    assert as_seen(off_by_a_tenth) == [compiled.WHAT]


def test_compiled_anew_for_each_layer():
    assert as_seen(anew_for_each_layer) == [f"{compiled.WHAT}, graphs beyond the first"]
