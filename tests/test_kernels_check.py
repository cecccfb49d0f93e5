"""Planted faults: each is caught by the row that is meant for it, and by no other."""

import importlib.metadata
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels_check import (
    attention,
    ceilings,
    collectives,
    compiled,
    environment,
    leak,
    nf4,
    optimizers,
    packages,
    ranks,
    repacking,
    zero3,
)
from kernels_check.__main__ import run_check, table
from kernels_check.rows import Row, guarded, judge
from loop.attention import packed_attention

sdpa = partial(packed_attention, backend="sdpa")


def verdicts(*results) -> dict[str, str]:
    return {row.what: row.verdict for rows in results for row in rows}


# ---- rows and the runner


@pytest.mark.parametrize("error, speed, verdict", [(0.1, 2.0, "ok"), (0.1, 0.1, "slow"), (2.0, 2.0, "wrong"), (float("nan"), 2.0, "wrong")])
def test_judge(error, speed, verdict):
    row = judge("a", "1", error, 1.0, "remedy", speed=speed, slowest=0.5)
    assert row.verdict == verdict and ("remedy" in row.note) == (verdict != "ok")
    assert row.blocks() == (verdict == "wrong")


def script(code: str) -> list[Row]:
    first = """import os, sys, time; print('{"what": "first"}', flush=True);"""
    return run_check([sys.executable, "-c", first + code], "attention", timeout=2)


@pytest.mark.parametrize(
    "code, note",
    [
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("time.sleep(99)", "no end within 2 s"),
        ("sys.exit('no such kernel')", "no such kernel"),
    ],
)
def test_crash_and_hang_become_rows_and_keep_earlier_ones(code, note):
    first, last = script(code)
    assert (first.what, first.verdict) == ("first", "ok")
    assert (last.what, last.verdict, last.blocks()) == ("attention", "wrong", True) and note in last.note


def test_silence_is_a_row():
    (row,) = run_check([sys.executable, "-c", "print('hello')"], "attention")
    assert row.blocks() and "after 0 rows" in row.note


def test_table_names_remedy_only_for_what_is_not_ok():
    text = table(
        [
            Row("fine", note="hidden"),
            Row("bad", verdict="wrong", note="do this"),
            Row("no", verdict="missing", note="why", required=False),
        ]
    )
    assert "hidden" not in text and "wrong: bad: do this" in text and "missing, not required: no: why" in text


# ---- environment


def torch_row(version="2.13.0+cpu", load=lambda name: None):
    return list(guarded("torch", packages.check_package, "torch", "2.13.0", lambda name: version, load))[0]


def test_pinned_version_is_ok_whatever_its_build():
    assert torch_row().verdict == "ok"


def test_other_version_than_the_pin_is_named_and_stops_nothing():
    row = torch_row("2.12.1")
    assert row.verdict == "wrong" and "2.13.0" in row.note and not row.blocks()


def test_pin_for_another_python_does_not_count():
    text = "# one set\na==1.0; python_version >= '3.9'\na==0.9; python_version < '3.9' # old\nb==2\n"
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


def test_native_library_that_did_not_load():
    class ErrorHandlerMockBNBNativeLibrary:
        pass

    assert verdicts(packages.check_native("1", ErrorHandlerMockBNBNativeLibrary())) == {"bitsandbytes library": "wrong"}
    assert verdicts(packages.check_native("1", object())) == {"bitsandbytes library": "ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants a torch that can't see the GPU")
def test_cpu_build_of_torch_on_a_gpu_machine():
    (row,) = environment.check_cuda("580.1", None)
    assert row.verdict == "wrong" and row.blocks()
    assert not next(environment.check_cuda("", None)).blocks()


# ---- attention


def attention_rows(attend):
    return verdicts(attention.check_numbers("x", "1", attend, "cpu"), leak.check_leak("x", "1", attend, "cpu"))


def test_attention_right():
    found = attention_rows(sdpa)
    assert found.pop("attention x") in ("ok", "slow") and found == {"attention x, leak": "ok"}  # slow: the machine may be busy


def test_attention_wrong_scale_is_no_leak():
    assert attention_rows(lambda *row: sdpa(*row, scale=0.1)) == {"attention x": "wrong", "attention x, leak": "ok"}


def test_attention_faint_leak_hides_in_the_numbers_only():
    found = attention_rows(lambda q, k, v, *rest: sdpa(q, k, v, *rest) + 0.02 * v.mean())
    assert found["attention x"] in ("ok", "slow") and found["attention x, leak"] == "wrong"


def test_attention_over_the_whole_row_leaks():
    whole = lambda q, k, v, bounds, longest: sdpa(q, k, v, bounds[[0, -1]], len(q))  # noqa: E731
    assert attention_rows(whole) == {"attention x": "wrong", "attention x, leak": "wrong"}


def test_attention_nan_in_padding():
    def attend(q, k, v, bounds, longest):
        out = sdpa(q, k, v, bounds, longest)
        return torch.where(torch.arange(len(out))[:, None, None] < bounds[-4], out, torch.nan)

    assert attention_rows(attend)["attention x"] == "wrong"


# ---- NF4

bnb = pytest.importorskip("bitsandbytes")
quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
ROUNDING = ["nf4 rounding, stored as uint8", "nf4 rounding, stored as bfloat16", "nf4 double quantisation"]


def nf4_rows(code=None, decode=dequantize, matmul=bnb.matmul_4bit):
    code = nf4.plain_codebook() if code is None else code
    return verdicts(
        nf4.check_codebook("1", code),
        nf4.check_rounding("1", quantize, decode, "cpu"),
        nf4.check_product("1", matmul, quantize, dequantize, "cpu"),
    )


def wrong(found: dict[str, str]) -> list[str]:
    return [what for what, verdict in found.items() if verdict in ("wrong", "missing")]


def test_nf4_right():
    assert wrong(nf4_rows()) == []


def test_published_codebook():
    # QLoRA, arXiv 2305.14314, appendix E, four of its sixteen values
    code = nf4.plain_codebook()
    assert code[[0, 1, 7, 8]].tolist() == pytest.approx([-1.0, -0.6961928009986877, 0.0, 0.07958029955625534], abs=1e-6)


def test_corrupt_codebook():
    code = nf4.plain_codebook()
    code[3] += 1e-3
    assert wrong(nf4_rows(code=code)) == ["nf4 codebook"]


def test_wrong_scale_of_blocks():
    assert wrong(nf4_rows(decode=lambda packed, state: 1.01 * dequantize(packed, state))) == ROUNDING


def test_double_quantisation_without_its_offset():
    def decode(packed, state):
        if state.nested:
            state.offset = state.offset * 0
        return dequantize(packed, state)

    assert wrong(nf4_rows(decode=decode)) == ["nf4 double quantisation"]


def test_product_without_its_gradient_or_off_by_a_scale():
    assert wrong(nf4_rows(matmul=lambda *a, **k: 1.05 * bnb.matmul_4bit(*a, **k))) == ["nf4 product and gradient"]


def repack(switch):
    layer = bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16).to("cpu")
    layer.support_avx512bf16_for_cpu = switch
    return verdicts(repacking.check_repacking("repacking", "1", layer))


def test_repacking_switched_off_changes_nothing():
    assert repack(False) == {"repacking": "ok"}


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16, so nothing repacks")
def test_repacking_in_eval_is_caught():
    assert repack(True) == {"repacking": "wrong"}


# ---- optimizers, ceilings


@pytest.mark.parametrize("change, verdict", [({}, "ok"), ({"weight_decay": 0.1}, "wrong"), ({"betas": (0.9, 0.999)}, "wrong")])
def test_optimizer(change, verdict):
    make = lambda p, **settings: torch.optim.AdamW(p, **(settings | change))  # noqa: E731
    (found,) = verdicts(optimizers.check_optimizer("x", "1", make, 1e-5, "cpu")).values()
    assert found.replace("slow", "ok") == verdict


def test_eight_bit_moments_are_within_their_bound():
    (row,) = optimizers.check_optimizer("AdamW8bit", "1", bnb.optim.AdamW8bit, optimizers.EIGHT_BIT_BOUND, "cpu")
    assert row.verdict in ("ok", "slow")


def test_ceilings():
    assert wrong(verdicts(ceilings.check_matrix_rate("cpu", lambda a, b: 1.1 * (a @ b)))) == ["bf16 matrix product"]
    assert wrong(verdicts(ceilings.check_bandwidth("cpu", lambda target, source: target[1:].copy_(source[1:])))) == ["memory copy"]


# ---- ranks: one start each, the fault and the sound case side by side


def all_reduce_that_forgets(x):
    dist.all_reduce(x)
    if x.numel() > 1 << 20:  # the large size only
        x[-1] = 0


def test_collectives_wrong_at_one_size():
    found = verdicts(ranks.on_ranks(collectives.check_collectives, all_reduce_that_forgets, dist.all_gather_into_tensor))
    assert len(found) == 6 and [what.split(" ", 1)[1].rsplit(",", 1)[0] for what in wrong(found)] == ["all-reduce, large"]


def test_zero3_fp16_storage_and_bf16_gradients_are_caught():
    config = json.loads((Path(zero3.__file__).parent.parent / "ds_config.json").read_text())
    config["data_types"] = {"grad_accum_dtype": "bf16"}
    found = verdicts(zero3.check_zero3((torch.bfloat16, torch.uint8, torch.float16), config))
    assert wrong(found) == ["zero3 NF4 stored as float16", "zero3 gradients add up in fp32"] and len(found) == 4


# ---- compile, with a backend that needs no compiler

graph_only = partial(torch.compile, backend="eager")


@pytest.fixture
def tiny():
    return compiled.llama_layers("cpu")


def test_compiled_right(tiny):
    assert wrong(verdicts(compiled.check_compiled(*tiny, graph_only))) == []


def test_compiled_numbers_wrong(tiny):
    def off(forward):
        return graph_only(lambda *a, **k: 1.1 * forward(*a, **k))

    assert "compiled layer" in wrong(verdicts(compiled.check_compiled(*tiny, off)))


def test_compiled_anew_for_each_layer(tiny):
    for index, layer in enumerate(tiny[0]):  # as DeepSpeed's `ds_id` on each parameter does: a guard that differs by layer
        layer.index = index
        layer.forward = _guarded_by_index.__get__(layer)
    assert wrong(verdicts(compiled.check_compiled(*tiny, graph_only))) == ["compiled layer, graphs beyond the first"]


def _guarded_by_index(self, x, **kwargs):
    return type(self).forward(self, x, **kwargs) * (1.0 if self.index >= 0 else self.index)
