"""One rank of `./launch.sh break`: it trains the embedded job right and then with the mistake.

`python tests/broken/ranks.py SPEC.json`. Both runs are in one process. What the command changes for
both (a spike, short notes, a stop in the middle) is planted first, so the mistake is the only
difference between them.
"""

import dataclasses
import gc
import json
import signal
import sys
import zlib
from pathlib import Path

import deepspeed
import numpy as np
import torch
from mistakes import MISTAKES, SHOWN_ONLY

import loop.data.dataset
import loop.evaluation.validator
import loop.train as train
from loop.config.cli import load_config
from loop.config.deepspeed import build_ds_config
from loop.config.schema import ConfigError
from loop.data.dataset import load_examples
from loop.distributed.exit import exit_with_config_error
from loop.distributed.world import Ranks
from loop.model.loading import load_tokenizer
from loop.monitor.quiet import quiet_libraries
from loop.monitor.run_logger import RunLogger
from loop.zero3.gradients import local_gradients

VALIDATION_EXAMPLES = 12  # enough to see a gap; an evaluation takes a second or two


class NoStop:
    """Replaces StopRequest: it asks to stop where the spec wants it.

    Ctrl-C ends the process at once.
    """

    reason, requested = None, False


def plant_spike(at: int, factor: float) -> None:
    """Makes the gradient of step `at` `factor` times as large, as of a damaged batch."""
    train_step = train.train_step
    train_run = train.train
    steps = 0  # of this run

    def spiked_step(engine, *args, **options):
        nonlocal steps
        steps += 1
        backward = engine.backward
        scale = factor if steps == at else 1.0
        engine.backward = lambda loss, **kw: backward(loss * scale, **kw)
        try:
            return train_step(engine, *args, **options)
        finally:
            engine.backward = backward

    def restarted_run(*args, **options):
        nonlocal steps
        steps = 0
        return train_run(*args, **options)

    train.train = restarted_run
    train.train_step = spiked_step


def shorten_notes() -> None:
    """Leaves of every second note only the line with the diagnosis.

    So examples have very unequal numbers of targets.
    """
    encode = loop.data.dataset.encode_examples

    def shorten(conversation):
        *dialogue, note = conversation.messages
        lines = [line for line in note["content"].splitlines() if line.startswith("A:")]
        note = note | {"content": lines[0] if lines else "A:"}
        return dataclasses.replace(conversation, messages=[*dialogue, note])

    def encode_shortened(tokenizer, conversations, *rest):
        shortened = [shorten(c) if zlib.crc32(c.id.encode()) % 2 else c for c in conversations]
        return encode(tokenizer, shortened, *rest)

    loop.data.dataset.encode_examples = encode_shortened


def watch_validation(config, eos: bool) -> None:
    """Evaluates both runs on the same right examples, whatever the mistake makes of its own.

    eos: also on their last token alone.
    """
    tokenizer = load_tokenizer(config.base)
    valid = load_examples(config, tokenizer, "valid")[0][:VALIDATION_EXAMPLES]
    ends = []
    for e in valid:
        is_last = np.arange(len(e)) == len(e) - 1
        ends.append(dataclasses.replace(e, labels=np.where(is_last, e.labels, -100)))
    evaluate = loop.evaluation.validator.evaluate_loss

    def both(engine, _, *rest):
        metrics = evaluate(engine, valid, *rest)
        if eos:
            metrics["eval/eos_loss"] = evaluate(engine, ends, *rest)["eval/loss"]
        return metrics

    loop.evaluation.validator.evaluate_loss = both


class QuietLogger(RunLogger):
    """Writes the files of a run and prints nothing."""

    def say(self, text: str) -> None:
        pass


class Recorder:
    """Watches the runs: the gradient of one step, the engine, and when to stop."""

    def __init__(self, spec: dict) -> None:
        self.record_at = spec["at"]
        self.stop_at = spec["resume"]
        self.steps = 0
        self.gradients: list[torch.Tensor] = []
        self.engine = None
        self.clip = train.clip_grad_norm
        train.clip_grad_norm = self.clip_and_record
        train.StopRequest = lambda *_: NoStop

    def clip_and_record(self, parameters, max_norm):
        self.steps += 1
        if self.steps == self.record_at:
            flat = torch.cat([g.flatten() for g in local_gradients(parameters)])
            self.gradients.append(flat.double().cpu())
        NoStop.requested = self.steps == self.stop_at
        NoStop.reason = "in mid-run" if NoStop.requested else None
        return self.clip(parameters, max_norm)

    def initialize(self, **kwargs):
        result = deepspeed.initialize(**kwargs)
        self.engine = result[0]
        return result

    def train(self, config) -> None:
        NoStop.reason, NoStop.requested = None, False
        train.train(
            config,
            build_ds_config(config),
            initialize=self.initialize,
            make_logger=QuietLogger,
        )
        self.engine.destroy()
        self.engine = None
        gc.collect()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet_libraries()
    spec = json.loads(Path(sys.argv[1]).read_text())
    ranks = Ranks()
    watch_validation(load_config(spec["args"]), spec["eos"])
    if spec["spike"]:
        plant_spike(*spec["spike"])
    if spec["short_notes"]:
        shorten_notes()
    recorder = Recorder(spec)
    for name in ("right", "wrong"):
        if name == "wrong":
            (MISTAKES | SHOWN_ONLY)[spec["name"]]()
        recorder.steps = 0
        for _ in range(2 if recorder.stop_at else 1):
            if ranks.is_main:
                resumed = f", from step {recorder.steps}" if recorder.steps else ""
                print(f"{name}{resumed}", flush=True)
            recorder.train(load_config([*spec["args"], f"run.name={name}"]))
    right, wrong = recorder.gradients
    difference, norm = ranks.sum_scalars(
        (wrong - right).square().sum().item(), right.square().sum().item()
    )  # their squares
    if ranks.is_main:
        distance = (difference / norm) ** 0.5
        report = {"step": recorder.record_at, "gradient_distance": distance}
        Path(spec["out"]).write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        exit_with_config_error(error)
