"""Runs the real `loop.train.train` for a list of cases on this rank and records what a step computed.

`python tests/proofs/worker.py CASES.json`: a list of {"name", "args", "out", "patch": {...}, "mistake": null}. Rank 0 writes
`out/NAME.safetensors` (gradients before and after clipping, weights before each step and after the last) and `out/NAME.json`
(norms, names, the report, hashes of the frozen weights before and after, and the error that ended the run, if one did)."""

import copy
import hashlib
import itertools
import json
import sys
from pathlib import Path

import deepspeed
import loop.notes
import loop.packing
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from mistakes import MISTAKES
from safetensors.torch import save_file

import loop.checkpoint
import loop.data
import loop.export
import loop.model
import loop.train as train

PATCHED = [
    train,
    loop.model.build,
    loop.data.dataset,
    loop.export.adapter,
    loop.model.loading,
    loop.generation.sharded,
]  # whose names cases replace; put back after each case


def frozen_digest(model) -> str:
    """A hash of every frozen parameter, gathered, and of its quantisation state."""
    digest = hashlib.sha256()
    for p in model.parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
            if state := getattr(p, "quant_state", None):
                for tensor in (
                    state.absmax,
                    state.code,
                    state.offset,
                    getattr(state.state2, "absmax", None),
                ):
                    if tensor is not None:
                        digest.update(
                            tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
                        )
    return digest.hexdigest()


def run(case: dict) -> None:
    saved, write = (
        [copy.copy(vars(module)) for module in PATCHED],
        loop.checkpoint.checkpointer.Checkpointer._write,
    )
    patch = case.get("patch", {})
    if "shuffle" in patch:  # another order within the step
        cut = train.split_step
        train.split_step = lambda step, *rest: [
            [part[::-1] for part in rank] for rank in cut(step, *rest)
        ]
    if "no_leaf" in patch:
        loop.model.loading.set_z3_leaf_modules = lambda model, classes: None
    if "non_reentrant" in patch:
        loop.model.build.use_checkpointing = lambda model: model.gradient_checkpointing_enable(
            {"use_reentrant": False}
        )
    if "compile" in patch:
        load = loop.model.build.load_model

        def compiled(*args, **kwargs):
            model = load(*args, **kwargs)
            for layer in loop.model.structure.decoder_layers(model):
                layer.forward = torch.compile(layer.forward)
            return model

        loop.model.build.load_model = compiled
    if "nan_step" in patch:  # one rank sees NaN in one step
        step_of, count = train.train_step, [0]

        def poisoned(engine, *args):
            count[0] += 1
            if count[0] >= patch["nan_step"] and count[0] < patch["nan_step"] + patch.get(
                "nan_times", 1
            ):
                backward = engine.backward
                bad = (
                    float("nan")
                    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
                    else 1.0
                )
                engine.backward = lambda loss, **kw: backward(loss * bad, **kw)
                try:
                    return step_of(engine, *args)
                finally:
                    engine.backward = backward
            return step_of(engine, *args)

        train.train_step = poisoned
    if (
        "bad_example" in patch
    ):  # the loss of any micro-batch with one of these examples is no number, whenever it is its turn
        collate, loss_of, bad = train.collate, train.summed_cross_entropy, []
        train.collate = lambda examples, *rest: (
            bad.append(any(e.id in patch["bad_example"] for e in examples))
            or collate(examples, *rest)
        )
        train.summed_cross_entropy = lambda *args: (
            loss_of(*args) * (float("nan") if bad.pop(0) else 1.0)
        )
    if "spike_at" in patch:  # as if the loss of that step were a spike
        steps = itertools.count(1)
        train.loss_spike_threshold = lambda *_: (
            -1.0 if next(steps) == patch["spike_at"] else float("inf")
        )
    if "stop_after" in patch:  # as if SIGTERM came during that step, on rank 0 alone

        class Stop:
            reason, requested = None, False

        stop, plain_step, done = Stop(), train.train_step, [0]

        def counting(*args):
            done[0] += 1
            stop.requested = done[0] >= patch["stop_after"] and torch.distributed.get_rank() == 0
            stop.reason = "SIGTERM" if stop.requested else None
            return plain_step(*args)

        train.train_step, train.StopRequest = counting, lambda *_: stop
    if "in_order" in patch:  # so many examples a step, as they stand in the file
        size = patch["in_order"]

        def in_order(lengths, budget, *_):
            n = len(lengths)
            return loop.data.batch_plan.BatchPlan(
                np.arange(n, dtype=np.int32), np.arange(0, n + 1, size), int(lengths.sum()), budget
            )

        train.plan_batches = in_order
    if "deepspeed_clips" in patch:  # DeepSpeed's own clipping instead of ours
        build = build_ds_config
        build_ds_config = lambda config: (
            build(config) | {"gradient_clipping": patch["deepspeed_clips"]}
        )
    if (
        "gathered" in patch
    ):  # sample notes after one gather, or in lockstep, whatever the machine has room for
        loop.generation.sharded.fits_unsharded = lambda *_: patch["gathered"]
    if "disk_full" in patch:

        def full(*args):
            raise OSError(28, "No space left on device")

        loop.checkpoint.checkpointer.Checkpointer._write = full
    if "spoil_export" in patch:  # the last tensor is written empty, as under a forgotten gather
        save = loop.export.adapter.save_file

        def one_empty(tensors, *args, **kwargs):
            name = sorted(tensors)[-1]
            save(tensors | {name: tensors[name][:0]}, *args, **kwargs)

        loop.export.adapter.save_file = one_empty
    if case.get("mistake"):
        MISTAKES[case["mistake"]]()

    tensors, norms, names = {}, [], []
    clip = train.clip_grad_norm

    def recording(parameters, max_norm):
        step = len(norms)
        for i, p in enumerate(parameters):
            tensors[f"{step}.weight.{i}"] = safe_get_full_fp32_param(p).detach().float().clone()
            tensors[f"{step}.grad.{i}"] = safe_get_full_grad(p).detach().float().clone()
        norm = clip(parameters, max_norm)
        norms.append(norm.item())
        for i, p in enumerate(parameters):
            tensors[f"{step}.clipped.{i}"] = safe_get_full_grad(p).detach().float().clone()
        return norm

    engines, frozen, report, error, said = [], [], {}, None, []
    say = train.RunLogger.say
    train.RunLogger.say = lambda self, text: said.append(text) or say(self, text)
    initialize = deepspeed.initialize
    train.clip_grad_norm = recording

    def remembering(**kwargs):
        result = initialize(**kwargs)
        engines.append(result[0])
        frozen.append(frozen_digest(result[0].module))
        return result

    deepspeed.initialize = remembering
    try:
        config = load_config(case["args"])
        report = train.train(config, build_ds_config(config))
    except (FloatingPointError, AuditError, ConfigError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    finally:
        deepspeed.initialize = initialize
        train.RunLogger.say = say
        loop.checkpoint.checkpointer.Checkpointer._write = write
        for module, before in zip(PATCHED, saved):
            vars(module).update(before)
    if engines:
        engines[0].empty_partition_cache()  # as export_model: gathers may be under way
        frozen.append(frozen_digest(engines[0].module))
        for i, (name, p) in enumerate(loop.optim.adamw.trainable_parameters(engines[0].module)):
            tensors[f"final.weight.{i}"] = safe_get_full_fp32_param(p).detach().float().clone()
            names.append(name)
        engines[0].destroy()
    if not torch.distributed.is_initialized():
        raise SystemExit(error)
    if torch.distributed.get_rank() == 0:
        out = Path(case["out"])
        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, out / f"{case['name']}.safetensors"
        )
        record = {
            "norms": norms,
            "names": names,
            "report": report,
            "frozen": frozen,
            "error": error,
            "said": said,
        }
        (out / f"{case['name']}.json").write_text(json.dumps(record))


for case in json.loads(Path(sys.argv[1]).read_text()):
    run(case)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
