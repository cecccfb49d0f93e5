"""Trains tiny bases of many families, one after the other, and says what became of each.

`python tests/families/worker.py FOLDER [--bf16] NAME...`: writes FOLDER/results.json, {name:
result}. With --bf16 the runs compute in it, as the kernels of GPUs want it. A result is
{"refused": line, "read_weights": bool}, or
{"gradient": relative difference to the plain reference in fp32, "generated": bool, "merged":
relative difference of the logits}, and with --bf16 "rounding": the plain reference's own.
"""

import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from family_bases import build_base
from helpers import ROOT, write_rows
from peft import AutoPeftModelForCausalLM
from reference import reference_steps
from transformers import AutoModelForCausalLM

import loop.model.build
import loop.train
from loop.config.cli import load_config
from loop.config.deepspeed import build_ds_config
from loop.config.schema import ConfigError
from loop.data.batch_plan import plan_run
from loop.data.dataset import load_training_data
from loop.export.audit import AuditError
from loop.export.merge import merge
from loop.export.standalone_loss import loss_of
from loop.generation.decode import generate_notes
from loop.generation.loading import load_for_generation, prompt_ids
from loop.kernels.attention import AttentionError
from loop.kernels.patches import _ROTARY_ORIGINALS, restore_rotary
from loop.model.loading import load_base, load_tokenizer
from loop.model.structure import switch_off_dropout
from loop.monitor.quiet import quiet_libraries
from loop.optim.lora_targets import put_lora
from loop.optim.schedule import build_lr_schedule


class Recorder:
    """Keeps a run's trainable weights before its first step, and each step's gradients."""

    def __init__(self) -> None:
        self.initial: list[torch.Tensor] = []
        self.gradients: list[list[torch.Tensor]] = []
        self.read_weights = False

    def install(self) -> None:
        clip, load = loop.train.clip_grad_norm, loop.model.build.load_model

        def recording(parameters, *args):
            if not self.initial:
                self.initial = [safe_get_full_fp32_param(p).clone().cpu() for p in parameters]
            self.gradients.append([safe_get_full_grad(p).clone().cpu() for p in parameters])
            return clip(parameters, *args)

        def loading(*args, **options):
            self.read_weights = True
            return load(*args, **options)

        loop.train.clip_grad_norm, loop.model.build.load_model = recording, loading
        self.undo = lambda: (
            setattr(loop.train, "clip_grad_norm", clip),
            setattr(loop.model.build, "load_model", load),
        )


def configure(base: Path, folder: Path, bf16: bool):
    ds = json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": bf16}}
    (folder / "ds.json").write_text(json.dumps(ds))
    values = {
        "base": str(base),
        "data": {"train": str(folder / "rows.jsonl"), "valid_fraction": 0, "cache": False},
        "max_seq_len": 1024,
        "batch_size": 2,
        "max_steps": 2,
        "lr": 1e-3,
        "eps": 1e-5,
        "lora": {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "init_lora_weights": False,
        },
        "deepspeed": str(folder / "ds.json"),
        "run": {"dir": str(folder), "name": base.name, "export_check_examples": 0},
    }
    path = folder / f"{base.name}.yaml"
    path.write_text(json.dumps(values))
    return load_config(["--config", str(path)])


def differences(recorder: Recorder, config, bf16: bool) -> dict[str, float]:
    """How far gradients are from the plain reference's in fp32, in the norm of a step.

    "gradient": the recorded ones, the larger of two steps. With `bf16` those of the first step
    alone, and "rounding": those of the plain reference in bf16.
    """
    tokenizer = load_tokenizer(config.base)
    data = load_training_data(config, tokenizer)
    plan = plan_run(config, data.lengths, data.weights)
    steps = [[data.train[i] for i in plan[step]] for step in range(1 if bf16 else len(plan))]

    def plain_gradients(dtype: torch.dtype) -> list[list[torch.Tensor]]:
        model = put_lora(load_base(config.base, dtype, "cpu"), config.lora).to(dtype)
        switch_off_dropout(model)  # the base's own
        records = reference_steps(
            model,
            recorder.initial,
            steps,
            build_lr_schedule(config, len(plan)),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            eps=config.eps,
        )
        return [record["grads"] for record in records]

    fp32 = plain_gradients(torch.float32)
    found = {"gradient": max(map(distance, recorder.gradients, fp32))}
    if bf16:
        found["rounding"] = distance(plain_gradients(torch.bfloat16)[0], fp32[0])
    return found


def distance(gradients: list[torch.Tensor], fp32: list[torch.Tensor]) -> float:
    """Relative, in the L2 norm over all tensors together."""
    off = sum((a.float() - b).square().sum() for a, b in zip(gradients, fp32, strict=True))
    return float(off**0.5 / sum(b.square().sum() for b in fp32) ** 0.5)


def try_family(name: str, folder: Path, bf16: bool) -> dict:
    base = folder / "bases" / name.replace(" ", "_")
    build_base(name, base)
    recorder = Recorder()
    recorder.install()
    try:
        config = configure(base, folder, bf16)
        report = loop.train.train(config, build_ds_config(config))
    except (ConfigError, AttentionError, AuditError) as error:
        line = str(error).replace(str(base), "BASE")
        return {"refused": line, "read_weights": recorder.read_weights}
    finally:
        recorder.undo()
        for module in list(_ROTARY_ORIGINALS):
            restore_rotary(module)
    adapter = os.path.abspath(report["exported"])
    os.chdir("/")  # an adapter loads from anywhere
    ids = torch.tensor([[1, 300, 301, 302]])
    stored = loss_of(adapter, "cpu", [([1, 300, 301], [-100, 300, 301])])  # as it was trained
    peft = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    merge(adapter, f"{adapter}-merged")
    merged = AutoModelForCausalLM.from_pretrained(f"{adapter}-merged", dtype=torch.float32)
    with torch.no_grad():  # PEFT widens the embedding where the tokenizer is larger
        wide, logits = (m(input_ids=ids, use_cache=False).logits for m in (peft, merged.eval()))
    model, tokenizer = load_for_generation(adapter, None, "cpu")
    notes = generate_notes(model, tokenizer, [prompt_ids(tokenizer, "Doctor: Hi.")], 4)
    return differences(recorder, config, bf16) | {
        "merged": float((wide[..., : logits.shape[-1]] - logits).norm() / logits.norm()),
        "generated": len(notes) == 1 and math.isfinite(stored),
    }


def main(folder: Path, names: list[str], bf16: bool) -> None:
    quiet_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    write_rows(folder / "rows.jsonl", "row", 12, 5, longest=6)
    results = {}
    for name in names:
        try:
            results[name] = try_family(name, folder, bf16)
        except Exception as error:  # what a user would see as a traceback
            lines = f"{type(error).__name__}: {error}".splitlines()
            results[name] = {"traceback": lines[0][:200]}
            if "TRACE" in os.environ:
                import traceback

                traceback.print_exc()
        print(name, results[name], file=sys.stderr, flush=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    names = [name for name in sys.argv[2:] if name != "--bf16"]
    main(Path(sys.argv[1]), names, "--bf16" in sys.argv)
