"""One rank of `./launch.sh break`: trains the embedded job twice in one process, right and then with the mistake planted.

`python tests/broken/ranks.py SPEC.json`. What the command changes for both runs (a spike, short notes, a stop in the middle) is planted
first, so the mistake is the only difference between them."""

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
    """In the place of StopRequest: asks to stop where the spec says so, and leaves Ctrl-C to end the process at once."""

    reason, requested = None, False


def plant_spike(at: int, factor: float) -> None:
    """The gradient of step `at` is `factor` times as large, as of a spoilt batch."""
    step, count = train.train_step, [0]

    def spiked(engine, *args, **options):
        count[0] += 1
        backward = engine.backward
        engine.backward = lambda loss, **kw: backward(
            loss * (factor if count[0] == at else 1.0), **kw
        )
        try:
            return step(engine, *args, **options)
        finally:
            engine.backward = backward

    def restarted(*args, **options):
        count[0] = 0
        return run(*args, **options)

    run, train.train, train.train_step = train.train, restarted, spiked


def shorten_notes() -> None:
    """Of every second note only the line with the diagnosis is left, so that examples have very unequal numbers of targets."""
    encode = loop.data.dataset.encode_examples

    def shortened(c):
        line = next(
            (line for line in c.messages[-1]["content"].splitlines() if line.startswith("A:")), "A:"
        )
        return dataclasses.replace(
            c, messages=[*c.messages[:-1], c.messages[-1] | {"content": line}]
        )

    loop.data.dataset.encode_examples = lambda tokenizer, conversations, *rest: encode(
        tokenizer,
        [shortened(c) if zlib.crc32(c.id.encode()) % 2 else c for c in conversations],
        *rest,
    )


def watch_validation(config, eos: bool) -> None:
    """Both runs are evaluated on the same right examples, whatever the mistake makes of its own.

    eos: and on their last token alone.
    """
    tokenizer = load_tokenizer(config.base)
    valid = load_examples(config, tokenizer, "valid")[0][:VALIDATION_EXAMPLES]
    ends = [
        dataclasses.replace(e, labels=np.where(np.arange(len(e)) == len(e) - 1, e.labels, -100))
        for e in valid
    ]
    evaluate = loop.evaluation.validator.evaluate_loss

    def both(engine, _, *rest):
        metrics = evaluate(engine, valid, *rest)
        if eos:
            metrics["eval/eos_loss"] = evaluate(engine, ends, *rest)["eval/loss"]
        return metrics

    loop.evaluation.validator.evaluate_loss = both


class QuietLogger(RunLogger):
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
    squares = ranks.sum_scalars((wrong - right).square().sum().item(), right.square().sum().item())
    if ranks.is_main:
        Path(spec["out"]).write_text(
            json.dumps(
                {"step": recorder.record_at, "gradient_distance": (squares[0] / squares[1]) ** 0.5}
            )
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        exit_with_config_error(error)
