"""Runs the real `loop.train.train` for a list of cases on this rank and records each step.

`python tests/proofs/worker.py CASES.json`: a list of
{"name", "args", "out", "patch": {...}, "mistake": null}. Rank 0 writes `out/NAME.safetensors`
(gradients before and after clipping, weights before each step and after the last) and
`out/NAME.json` (norms, names, the report, how the model was run, hashes of the frozen weights
before and after, and the error that ended the run, if one did).
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import random
import sys
from pathlib import Path

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from mistakes import MISTAKES
from safetensors.torch import save_file

import loop.checkpoint.store
import loop.checkpoint.train_state
import loop.data.dataset
import loop.export.adapter
import loop.generation.sharded
import loop.model.build
import loop.model.loading
import loop.train as train
from loop.config.cli import load_config
from loop.config.deepspeed import build_ds_config
from loop.config.schema import ConfigError
from loop.data.batch_plan import BatchPlan
from loop.evaluation.validator import Validator
from loop.export.audit import AuditError
from loop.kernels.attention import ATTENTION_BACKENDS, register_backend
from loop.model.activation_checkpointing import checkpointed_forward
from loop.model.structure import decoder_layers
from loop.monitor.run_logger import RunLogger
from loop.optim.adamw import trainable_parameters

# Modules whose names the cases replace. They are put back after each case.
PATCHED = [
    train,
    loop.checkpoint.train_state,
    loop.data.dataset,
    loop.export.adapter,
    loop.generation.sharded,
    loop.model.build,
    loop.model.loading,
]
NAN, INF = float("nan"), float("inf")
DRAWN: list[list] = []  # by `watch_dropout`


def frozen_digest(model) -> str:
    """A hash of every frozen parameter, gathered, and of its quantisation state."""
    digest = hashlib.sha256()
    for p in model.parameters():
        if p.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([p]):
            digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        state = getattr(p, "quant_state", None)
        if state is None:
            continue
        nested = getattr(state.state2, "absmax", None)
        for tensor in (state.absmax, state.code, state.offset, nested):
            if tensor is not None:
                flat = tensor.detach().cpu().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# What a case's "patch" may name: each function gets the value that stands there.


def shuffle(_) -> None:
    """Another order within each micro-batch."""
    split = train.split_step
    train.split_step = lambda step, *rest: [
        [part[::-1] for part in rank] for rank in split(step, *rest)
    ]


def no_leaf(_) -> None:
    loop.model.loading.set_z3_leaf_modules = lambda model, classes: None


def non_reentrant(_) -> None:
    loop.model.build.use_checkpointing = lambda model: model.gradient_checkpointing_enable(
        {"use_reentrant": False}
    )


def compile_layers(_) -> None:
    load = loop.model.build.load_model

    def compiled(*args, **kwargs):
        model = load(*args, **kwargs)
        for layer in decoder_layers(model):
            layer.forward = torch.compile(layer.forward)
        return model

    loop.model.build.load_model = compiled


def nan_steps(first: int, times: int) -> None:
    """The last rank's loss is NaN in so many steps, from step `first` on."""
    step, count = train.train_step, itertools.count(1)

    def poisoned(engine, *args, **options):
        if not first <= next(count) < first + times:
            return step(engine, *args, **options)
        backward = engine.backward
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        factor = NAN if is_last else 1.0
        engine.backward = lambda loss, **kw: backward(loss * factor, **kw)
        try:
            return step(engine, *args, **options)
        finally:
            engine.backward = backward

    train.train_step = poisoned


def bad_example(ids: list[str]) -> None:
    """The loss of any micro-batch with one of these examples is NaN, whenever it is its turn."""
    collate, cross_entropy, is_bad = train.collate, train.summed_cross_entropy, []

    def remembering(examples, *rest):
        is_bad.append(any(e.id in ids for e in examples))
        return collate(examples, *rest)

    train.collate = remembering
    train.summed_cross_entropy = lambda *args: (
        cross_entropy(*args) * (NAN if is_bad.pop(0) else 1.0)
    )


def spike_at(step: int) -> None:
    """As if the loss of that step were a spike."""
    steps = itertools.count(1)
    loop.checkpoint.train_state.loss_spike_threshold = lambda *_: (
        -1.0 if next(steps) == step else INF
    )


def stop_after(steps: int) -> None:
    """As if SIGTERM came during that step, on rank 0 alone."""

    class Stop:
        reason, requested = None, False

    stop, train_step, count = Stop(), train.train_step, itertools.count(1)

    def counting(*args, **options):
        stop.requested = next(count) >= steps and torch.distributed.get_rank() == 0
        stop.reason = "SIGTERM" if stop.requested else None
        return train_step(*args, **options)

    train.train_step = counting
    train.StopRequest = lambda *_: stop


def in_order(size: int) -> None:
    """So many examples a step, as they stand in the file."""

    def plan(config, lengths, weights):
        order = np.arange(len(lengths), dtype=np.int32)
        offsets = np.arange(0, len(lengths) + 1, size)
        return BatchPlan(order, offsets, int(lengths.sum()), config.tokens_per_step)

    train.plan_run = plan


def gathered(answer: bool) -> None:
    """Sample notes after one gather, or in lockstep, whatever the machine has room for."""
    loop.generation.sharded.fits_unsharded = lambda *_: answer


def disk_full(_) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    loop.checkpoint.store.CheckpointStore.write = full


def spoil_export(_) -> None:
    """The last tensor is written empty, as under a forgotten gather."""
    save = loop.export.adapter.save_file

    def one_empty(tensors, *args, **kwargs):
        name = sorted(tensors)[-1]
        save(tensors | {name: tensors[name][:0]}, *args, **kwargs)

    loop.export.adapter.save_file = one_empty


def losses_at(losses: dict[str, float]) -> None:
    """The validation after so many steps has this loss instead of its own."""
    evaluate = Validator._evaluate

    def scripted(self, step):
        figures = evaluate(self, step)
        return figures and figures | {"eval/loss": losses[str(step)]}

    Validator._evaluate = scripted


def watch_dropout(_) -> None:
    """Notes of each draw of masks: the seed, the rate, the step, and the examples."""
    install = loop.model.build.install_dropout

    def watched(*args):
        masks = install(*args)
        draw = masks.draw

        def noted(step, examples, cu_seqlens):
            DRAWN.append([masks.seed, masks.p, int(step), list(map(int, examples))])
            draw(step, examples, cu_seqlens)

        masks.draw = noted
        return masks

    loop.model.build.install_dropout = watched


def other_attention(name: str) -> None:
    """SDPA under another name."""
    sdpa = ATTENTION_BACKENDS["sdpa"]
    register_backend(dataclasses.replace(sdpa, name=name, transformers_name=f"packed_{name}"))


def draw_numbers(_) -> None:
    """Each step draws from the generators of its rank."""
    step = train.train_step

    def drawing(*args, **options):
        result = step(*args, **options)
        torch.rand(1), random.random(), np.random.rand()
        return result

    train.train_step = drawing


PATCHES = {
    "watch_dropout": watch_dropout,
    "draw_numbers": draw_numbers,
    "other_attention": other_attention,
    "losses_at": losses_at,
    "shuffle": shuffle,
    "no_leaf": no_leaf,
    "non_reentrant": non_reentrant,
    "compile": compile_layers,
    "bad_example": bad_example,
    "spike_at": spike_at,
    "stop_after": stop_after,
    "in_order": in_order,
    "gathered": gathered,
    "disk_full": disk_full,
    "spoil_export": spoil_export,
}


def plant(patch: dict, mistake: str | None) -> None:
    for name, value in patch.items():
        if name in PATCHES:
            PATCHES[name](value)
    if "nan_step" in patch:
        nan_steps(patch["nan_step"], patch.get("nan_times", 1))
    if mistake:
        MISTAKES[mistake]()


class Recorder:
    """Weights, gradients and norms of each step, and what else a case made."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.norms: list[float] = []
        self.names: list[str] = []
        self.frozen: list[str] = []
        self.said: list[str] = []
        self.seen: dict = {}  # how the model was run
        self.engine = None
        self.clip = train.clip_grad_norm
        train.clip_grad_norm = self.clip_and_record
        self.watch(train, "StopRequest", lambda max_hours: {"max hours": max_hours})
        self.watch(train, "train_step", lambda *_, **options: {"chunk": options["loss_chunk"]})
        self.watch(
            loop.model.build,
            "install_fused_parts",
            lambda _, cached: {"fused": True, "copies": cached},
        )

    def watch(self, module, name: str, what) -> None:
        """Takes what a function of the loop is called with into `seen`."""
        called = getattr(module, name)

        @functools.wraps(called)
        def watched(*args, **options):
            self.seen |= what(*args, **options)
            return called(*args, **options)

        setattr(module, name, watched)

    def clip_and_record(self, parameters, max_norm):
        step = len(self.norms)
        for i, p in enumerate(parameters):
            self._keep(f"{step}.weight.{i}", safe_get_full_fp32_param(p))
            self._keep(f"{step}.grad.{i}", safe_get_full_grad(p))
        norm = self.clip(parameters, max_norm)
        self.norms.append(norm.item())
        for i, p in enumerate(parameters):
            self._keep(f"{step}.clipped.{i}", safe_get_full_grad(p))
        return norm

    def initialize(self, **kwargs):
        """In the place of deepspeed.initialize."""
        result = deepspeed.initialize(**kwargs)
        self.engine = result[0]
        self.frozen.append(frozen_digest(self.engine.module))
        return result

    def make_logger(self, config, execution, engine, *args):
        logger = RunLogger(config, execution, engine, *args)
        layer = decoder_layers(engine.module)[0]
        self.seen |= {
            "attention": engine.module.config._attn_implementation,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "max tokens": execution.max_tokens,
            "recomputed": getattr(layer.forward, "func", None) is checkpointed_forward,
            "replicated": execution.replicated,
        }
        say = logger.say
        logger.say = lambda text: self.said.append(text) or say(text)
        return logger

    def finish(self) -> None:
        if self.engine is None:
            return
        self.engine.empty_partition_cache()  # as export_model: gathers may be under way
        self.frozen.append(frozen_digest(self.engine.module))
        for i, (name, p) in enumerate(trainable_parameters(self.engine.module)):
            self._keep(f"final.weight.{i}", safe_get_full_fp32_param(p))
            self.names.append(name)
        self.engine.destroy()

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.detach().float().clone().contiguous()


def run(case: dict) -> None:
    saved = [copy.copy(vars(module)) for module in PATCHED]
    write, evaluate = loop.checkpoint.store.CheckpointStore.write, Validator._evaluate
    patch = case.get("patch", {})
    DRAWN.clear()
    plant(patch, case.get("mistake"))
    recorder, report, error = Recorder(), {}, None
    try:
        config = load_config(case["args"])
        ds_config = build_ds_config(config) | patch.get("deepspeed", {})
        if "deepspeed_clips" in patch:  # DeepSpeed's own clipping instead of ours
            ds_config |= {"gradient_clipping": patch["deepspeed_clips"]}
        report = train.train(
            config,
            ds_config,
            initialize=recorder.initialize,
            make_logger=recorder.make_logger,
        )
    except (FloatingPointError, AuditError, ConfigError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    finally:
        loop.checkpoint.store.CheckpointStore.write = write
        Validator._evaluate = evaluate
        for module, before in zip(PATCHED, saved):
            vars(module).update(before)
    recorder.finish()
    if not torch.distributed.is_initialized():
        raise SystemExit(error)
    if torch.distributed.get_rank() == 0:
        out = Path(case["out"])
        out.mkdir(parents=True, exist_ok=True)
        save_file(recorder.tensors, out / f"{case['name']}.safetensors")
        record = {
            "norms": recorder.norms,
            "names": recorder.names,
            "report": report,
            "frozen": recorder.frozen,
            "error": error,
            "said": recorder.said,
            "seen": recorder.seen,
            "drawn": DRAWN,
        }
        (out / f"{case['name']}.json").write_text(json.dumps(record))


for case in json.loads(Path(sys.argv[1]).read_text()):
    run(case)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
