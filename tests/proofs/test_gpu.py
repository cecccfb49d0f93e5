"""By hand on a GPU machine (`./launch.sh test -m gpu -n 0 -s`): the proofs of test_train.py with
the GPU's kernels at TinyLlama's shape.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_ok
from reference import reference_model, reference_steps
from safetensors.torch import load_file
from test_gradient import ROUNDING_OF_FP8, distance, numbered, replayed, rounding

from loop.config.cli import load_config
from loop.data.batch_plan import plan_batches
from loop.data.dataset import load_examples
from loop.kernels.attention_backends import available_backends
from loop.model.loading import load_tokenizer

pytestmark = pytest.mark.gpu
STEPS = 2
CASES = {
    "flash_attn_4": ["attention=flash_attn_4"],
    "flash_attn": ["attention=flash_attn"],
    "varlen": ["attention=varlen"],
    "varlen, launched kernel by kernel": ["attention=varlen", "cuda_graphs=false"],
    "varlen, as PEFT computes it": ["attention=varlen", "cuda_graphs=false", "fused_layers=false"],
    "varlen, micro-batches of 2 rows": ["attention=varlen", "micro_batch_size=2"],
    "varlen, checkpointing": ["attention=varlen", "gradient_checkpointing=true"],
}

IN_FP8 = {"varlen, in FP8": ["attention=varlen", "compute=fp8"]}


@pytest.fixture(scope="module")
def runs(tinyllama, rows, tmp_path_factory):
    """A function that runs a case and gives (config, the examples of each step, its record)."""
    folder = tmp_path_factory.mktemp("gpu")
    args = [
        "--config",
        "loop/configs/soap_qlora.yaml",
        f"base={tinyllama}",
        f"data.train={rows['train']}",
        "data.valid=null",
        "data.test=null",
        "data.valid_fraction=0",
        "run.export_check_examples=0",
        "monitor.sample_notes=[]",
        f"run.dir={folder}",
        "lora.lora_dropout=0.0",
        "eps=1e-5",
        "lora.init_lora_weights=false",
        f"max_steps={STEPS}",
        "run.resume=false",
        "batch_size=4",
        "lr=1e-3",
        "max_grad_norm=0.5",
    ]

    def run(name: str):
        case = {
            "name": name,
            "args": [*args, *(CASES | IN_FP8)[name], f"run.name={name}"],
            "out": str(folder / "out"),
        }
        (folder / "cases.json").write_text(json.dumps([case]))
        run_ok(1, "tests/proofs/worker.py", str(folder / "cases.json"), gpu=True)
        log = [
            json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        out = folder / "out" / name
        record = json.loads(Path(f"{out}.json").read_text()) | {
            "tensors": {k: v.cuda() for k, v in load_file(f"{out}.safetensors").items()},
            "loss": [line["train/loss"] for line in log if "train/loss" in line],
        }
        config = load_config(args)
        examples, _ = load_examples(config, load_tokenizer(config.base), "train")
        plan = plan_batches(
            np.array([len(e) for e in examples]),
            config.tokens_per_step,
            config.seed,
            config.epochs,
            config.max_steps,
        )
        return config, [[examples[i] for i in plan[s]] for s in range(len(plan))], record

    return run


@pytest.mark.parametrize("name", CASES)
def test_real_kernels_add_no_error_to_the_plain_loops_rounding(runs, name):
    backend = name.split(",")[0]
    if available_backends("cuda")[backend].startswith("missing"):
        pytest.skip(f"{backend} is not installed")
    config, steps, record = runs(name)
    seen, update = rounding(record, steps, config, "cuda"), replayed(record, config, STEPS)
    print(
        f"\n{name}",
        [{k: f"{a:.1e} ({b:.1e})" for k, (a, b) in figures.items()} for figures in seen],
        f"update {update:.1e}",
    )
    for figures in seen:
        assert figures["gradient"][0] < 1.5 * figures["gradient"][1] < 0.2
        assert (
            figures["norm"][0] < figures["gradient"][1]
            and figures["loss"][0] < 0.1 * figures["gradient"][1]
        )
    # An update of some 3e-4 on weights of up to 0.35, whose fp32 steps are 3e-8; the fused AdamW
    # rounds in other places: 4.0e-5 seen.
    assert update < 1e-4
    assert record["frozen"][0] == record["frozen"][1]


def gradients_by_layer(names: list[str], gradients: list) -> dict[str, list]:
    """The gradients of each decoder layer, and of A and B of all layers."""
    parts: dict[str, list] = {}
    for name, gradient in zip(names, gradients, strict=True):
        layer = re.search(r"layers\.(\d+)", name)
        for part in (f"layer {layer[1]}", re.search(r"lora_[AB]", name)[0], "all"):
            parts.setdefault(part, []).append(gradient)
    return parts


def test_fp8_gradients_beside_bf16s_own(runs):
    """The first step's, layer by layer, against the plain loop in fp32 from the same weights."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs FP8")
    seen = {}
    for name in ("varlen", *IN_FP8):
        config, steps, record = runs(name)
        model = reference_model(config.base, config.method, config.lora, device="cuda")
        exact = reference_steps(
            model,
            numbered(record, "0.weight"),
            steps[:1],
            lambda _: 0.0,
            weight_decay=0.0,
            max_grad_norm=1e9,
        )[0]["grads"]
        ours = gradients_by_layer(record["names"], numbered(record, "0.grad"))
        wanted = gradients_by_layer(record["names"], exact)
        seen[name] = {part: distance(ours[part], wanted[part]) for part in wanted}
        flat, flat_exact = (
            torch.cat([g.double().flatten() for g in parts["all"]]) for parts in (ours, wanted)
        )
        along = (flat @ flat_exact / flat_exact.square().sum()).item()
        print(f"\n{name}: the projection on the exact gradient is {along:.4f} of it")
        assert abs(along - 1) < 0.05
    bf16, fp8 = seen.values()
    for part in bf16:
        print(f"{part:9} bf16 {bf16[part]:.2e}  FP8 {fp8[part]:.2e}  {fp8[part] / bf16[part]:5.1f}")
        assert fp8[part] < ROUNDING_OF_FP8 * bf16[part]
    assert fp8["all"] > 2 * bf16["all"]  # it was FP8


@pytest.fixture(scope="module")
def broken(tinyllama, rows, tmp_path_factory):
    """A function that runs parts of a run of 8 steps, each part on so many GPUs and for so many
    steps, and gives its folder.
    """
    folder = tmp_path_factory.mktemp("broken")
    fp32 = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}
    (folder / "fp32.json").write_text(json.dumps(fp32))
    args = [
        "--config",
        "loop/configs/soap_qlora.yaml",
        f"base={tinyllama}",
        f"data.train={rows['train']}",
        f"data.valid={rows['valid']}",
        "data.test=null",
        "monitor.sample_notes=[]",
        f"run.dir={folder}",
        "epochs=4",
        "max_steps=8",
        "batch_size=2",
        "lr=1e-3",
        "run.save_steps=3",
        "run.export_check_examples=0",
        "monitor.eval_steps=4",
    ]

    def run(name: str, *parts: tuple[int, int | None, list[str]]) -> Path:
        for number, (gpus, steps, more) in enumerate(parts):
            patch = {"stop_after": steps} if steps else {}
            case = {
                "name": f"{name}-{number}",
                "args": [*args, f"run.name={name}", *more],
                "out": str(folder / "out"),
                "patch": patch,
            }
            (folder / "cases.json").write_text(json.dumps([case]))
            run_ok(gpus, "tests/proofs/worker.py", str(folder / "cases.json"), gpu=True)
        return folder / name

    run.fp32 = ["attention=sdpa", f"deepspeed={folder / 'fp32.json'}"]
    return run


def curve(folder: Path, key: str) -> list[float]:
    return [
        line[key]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if key in line
    ]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit_with_deterministic_kernels(broken, gpus):
    """bf16, dropout on, flash attention, run.deterministic; it prints how long a save takes."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    exact = ["run.deterministic=true"]
    whole = broken(f"whole{gpus}", (gpus, None, exact))
    parts = broken(f"parts{gpus}", (gpus, 2, exact), (gpus, None, exact))
    for key in ("train/loss", "train/grad_norm", "train/lr", "eval/loss"):
        assert curve(whole, key) == curve(parts, key) and len(curve(whole, key)) > 2, key
    manifests = [
        json.loads((f / "checkpoints" / "newest" / "manifest.json").read_text())
        for f in (whole, parts)
    ]
    assert (
        manifests[0]["files"] == manifests[1]["files"]
        and manifests[0]["rng"] == manifests[1]["rng"]
    )
    print(f"\n{gpus} GPUs: saves took {curve(whole, 'train/save_seconds')} s")


@pytest.mark.parametrize(("name", "bound"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_another_number_of_gpus_goes_on_with_the_same_steps(broken, name, bound):
    """4, 2, 1 and 4 GPUs (as many of these as are here) and another micro-batch size, dropout on:
    the unbroken run's losses to rounding.
    """
    most = torch.cuda.device_count()
    more = (
        [*broken.fp32, "replicate_weights=false"] if name == "fp32" else []
    )  # in bf16 several ranks keep all weights and replay
    whole = broken(f"{name}-whole", (1, None, more))
    worlds = [gpus for gpus in (4, 2) if gpus <= most] or [1]
    parts = broken(
        f"{name}-parts",
        *((gpus, 2, more) for gpus in worlds),
        (1, 2, [*more, "micro_batch_size=1"]),
        (worlds[0], None, more),
    )
    apart = max(
        abs(a / b - 1)
        for a, b in zip(curve(parts, "train/loss"), curve(whole, "train/loss"), strict=True)
    )
    sequence = " -> ".join(map(str, [*worlds, 1, worlds[0]]))
    print(f"\n{name}, {sequence} GPUs: losses differ by up to {apart:.1e}")
    assert apart < bound
